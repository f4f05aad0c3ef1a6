"""Starts ``relora-mora pretrain``: ``deepspeed launch/pretrain.py CONFIG.yaml [--section.key=value ...]``."""

from _start import start  # launch/_start.py

if __name__ == "__main__":
    start("pretrain")
