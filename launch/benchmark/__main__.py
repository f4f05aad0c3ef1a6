"""``python -m launch.benchmark steps|layers|parts|data|trainer ...``, from the top of the checkout; also under a launcher."""

from __future__ import annotations

import importlib
import sys

from relora_mora.cli import run

KINDS = {
    "steps": "whole training steps of several methods side by side: time, memory, traffic",
    "layers": "the seven linears of a decoder layer, forward and backward",
    "parts": "head and loss, attention, matrix products",
    "data": "text to tokens, beside the tokenizer alone",
    "trainer": "the trainer beside bare loops",
}


def main() -> None:
    # DeepSpeed's launcher puts its --local_rank first
    kind = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if kind not in KINDS:
        print("usage: python -m launch.benchmark KIND ... (KIND --help says more); the kinds:")
        print("\n".join(f"  {name:8} {what}" for name, what in KINDS.items()))
        raise SystemExit(0 if kind is None and "--help" in sys.argv else 2)
    arguments = list(sys.argv[1:])
    arguments.remove(kind)
    run(importlib.import_module(f"launch.benchmark.{kind}").main, arguments)


if __name__ == "__main__":
    main()
