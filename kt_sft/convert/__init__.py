"""Checkpoints into packed containers: what will be written, writing it, reading it back."""
