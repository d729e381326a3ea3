"""Operators on tensors. Only requires torch."""
