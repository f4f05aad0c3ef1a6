"""Which parameters train, with which rule, and at which rate."""
