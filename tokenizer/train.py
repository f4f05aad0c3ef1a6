"""Starts ``relora-mora train-tokenizer``: ``python tokenizer/train.py --data='texts/*.txt' --out=tokenizers/mine``."""

try:
    from relora_mora.__main__ import start
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None

if __name__ == "__main__":
    start("train-tokenizer")
