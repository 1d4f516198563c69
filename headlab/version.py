"""The version, by itself: reading it needs nothing else."""

__version__ = "0.1.0"
