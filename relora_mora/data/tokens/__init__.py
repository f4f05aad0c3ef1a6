"""Pre-tokenized text: its index, its files, and how they are made."""
