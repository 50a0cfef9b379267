"""Differentiable operations on the native kernels, and the same maths in plain torch."""
