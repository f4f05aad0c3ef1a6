"""Starts ``relora-mora demo``."""

from _start import start  # launch/_start.py

if __name__ == "__main__":
    start("demo")
