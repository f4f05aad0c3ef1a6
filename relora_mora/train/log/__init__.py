"""What a run reports: metrics, loggers, progress."""
