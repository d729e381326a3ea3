"""Formulas: tensors in, tensors out. Needs torch and nothing else."""
