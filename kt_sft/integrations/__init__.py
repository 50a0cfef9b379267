"""Plugs for transformers, PEFT and LLaMA-Factory; each external project is known to one module only."""
