"""What the commands share: arguments, help, messages, exit codes, Ctrl-C."""
