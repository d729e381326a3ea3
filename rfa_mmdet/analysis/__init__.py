"""Analyse a detector's complexity and attention."""
