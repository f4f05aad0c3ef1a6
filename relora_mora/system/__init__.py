"""The machine: files, processes, devices and logs. Nothing here knows about training."""
