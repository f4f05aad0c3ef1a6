"""The tokenizer: loaded exactly, never parsing text for special tokens."""
