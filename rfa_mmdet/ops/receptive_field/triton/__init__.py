"""Triton kernels of the receptive-field convolutions."""
