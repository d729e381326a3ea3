"""Datasets, data checks, generated shapes and converters."""
