"""Differentiable operations on the native kernels."""
