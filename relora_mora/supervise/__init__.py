"""How a run ends in order: signals, launchers, lost ranks, exit codes, and one trainer per run folder.

``watchdog`` needs torch and is imported with the training code. The rest is light, so that a process can be guarded
before its slow imports.
"""
