"""Sets that are read once from first to last: held-out text, counts of epochs, samples to look at."""
