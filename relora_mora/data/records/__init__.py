"""From records to tokens: conversations, prompts and answers."""
