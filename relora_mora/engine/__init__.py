"""The only room that imports DeepSpeed: it starts DeepSpeed, gives access to its state, and merges adapters."""
