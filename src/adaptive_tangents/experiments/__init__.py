"""Published and new claims as experiments: one file each, from a config dataclass to a result dataclass."""
