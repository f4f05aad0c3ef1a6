"""The LLaMA family: configs, the model, and its loss."""
