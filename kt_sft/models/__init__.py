"""What a model's routed experts look like, derived from transformers."""
