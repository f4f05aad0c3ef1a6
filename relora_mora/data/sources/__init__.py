"""From the names in the settings to an ordered list of shards."""
