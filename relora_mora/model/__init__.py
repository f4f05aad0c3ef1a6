"""Any causal language model of transformers: its config, its forward and its loss."""
