"""Copies between devices, and nothing else copies: routes of a call's tensors, staging memory, streams, events."""
