"""Copies between devices: staging memory, streams, events."""
