"""Comparing runs: tables, curves and figures, from the files of their folders."""
