"""What a run reports: metrics and loggers."""
