"""Turns records (conversations, prompts and answers) into tokens."""
