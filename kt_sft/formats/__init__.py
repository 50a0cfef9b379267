"""Checkpoint files: reading and writing, without any model knowledge."""
