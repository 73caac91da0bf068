"""Passes over rows as kernels for Hopper GPUs, forward and backward."""
