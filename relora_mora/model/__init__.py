"""The LLaMA family: configs, model and loss."""
