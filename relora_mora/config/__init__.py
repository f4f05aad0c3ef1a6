"""Typed settings of a run: schema, combinations that cannot work, reading."""
