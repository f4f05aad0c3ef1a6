"""The typed settings of a run: schema, checks of combinations, and reading."""
