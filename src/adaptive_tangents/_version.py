"""The version, apart from everything else, so that it can be told without loading anything."""

__version__ = "0.2.0"
