"""Differentiable operations on the native kernels: what autograd sees of them."""
