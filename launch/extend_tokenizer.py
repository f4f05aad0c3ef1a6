"""Starts ``relora-mora extend-tokenizer``."""

from _start import start  # launch/_start.py

if __name__ == "__main__":
    start("extend-tokenizer")
