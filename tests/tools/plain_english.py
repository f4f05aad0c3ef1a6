"""``make lint``: counts words that make English hard to read, and fails if there are too many per 10,000 lines.

The limits are the highest rates found in OLMo-core, torchtitan, nanochat and mosaicml-streaming.
"""

import re

from tests.tools.helpers import ROOT

# word: the most of it per 10,000 lines
LIMITS = {
    " where ": 30,
    " is no ": 5,
    " behind": 5,
    " beside ": 5,
    " alone": 5,
    " told": 5,
    " anew": 5,
    " stands": 5,
    " of which": 5,
    " that of ": 5,
}
TEXTS = {
    "code": ("relora_mora/**/*.py", "launch/**/*.py", "tokenizer/*.py"),
    "docs": ("*.md", "docs/*.md", "docs/tutorials/*.md", "configs/**/*.md", "tokenizer/*.md"),
}


def main() -> None:
    too_many = []
    for name, patterns in TEXTS.items():
        text = "\n".join(path.read_text(encoding="utf-8") for each in patterns for path in ROOT.glob(each))
        lines = text.count("\n") + 1
        words = re.sub(r"\s+", " ", text)  # a word may be at the end of a line
        words = re.sub(r"\b([Tt]here) is no ", r"\1 are no ", words)  # "there is no" is fine
        rates = {word: 10_000 * words.count(word) / lines for word in LIMITS}
        too_many += [
            f'"{word.strip()}" {rate:.1f} times per 10,000 lines of {name}, at most {LIMITS[word]}'
            for word, rate in rates.items()
            if rate > LIMITS[word]
        ]
    if too_many:
        raise SystemExit("\n".join(["write plainly (CONTRIBUTING.md, Style):", *too_many]))


if __name__ == "__main__":
    main()
