"""The bytes of a shard, from a disk, a server or the hub."""
