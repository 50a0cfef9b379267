"""Builds the demo model: SmolLM2-135M-Instruct rewritten, without changing its function, as a sparse MoE."""
