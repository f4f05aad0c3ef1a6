"""Data that is read once from beginning to end: held-out sets, counts of epochs, samples to show."""
