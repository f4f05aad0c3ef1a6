"""The machine: files, memory, devices, the log. Knows nothing of training."""
