"""Data sets, the checks before a run, generated shapes, converters."""
