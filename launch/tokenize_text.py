"""Starts ``relora-mora tokenize``. A file called tokenize.py would hide the module of Python from the other scripts."""

from _start import start  # launch/_start.py

if __name__ == "__main__":
    start("tokenize")
