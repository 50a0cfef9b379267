"""Modules that stand in the model."""
