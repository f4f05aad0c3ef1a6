"""The training loop and the events between its steps."""
