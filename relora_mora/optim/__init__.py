"""Which parameters train, by which rule, at which rate."""
