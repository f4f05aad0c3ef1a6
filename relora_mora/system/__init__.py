"""The machine: files, processes, devices, logs. Knows nothing of training."""
