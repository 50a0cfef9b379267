"""Adapters merged into their base model."""
