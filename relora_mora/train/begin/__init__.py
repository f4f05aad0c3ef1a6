"""The start of a run: checks, inputs, identity, and building its parts."""
