"""The tokenizer: it is loaded exactly, and never parses special tokens in text."""
