"""Ends runs in an orderly way: signals, launchers, lost ranks, exit codes, and one trainer per run folder.

``watchdog`` needs torch and is imported with the training code. Everything else imports quickly, so that a process can
be guarded before its slow imports.
"""
