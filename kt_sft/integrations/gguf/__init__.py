"""Model directories made of GGUF files, and the way back."""
