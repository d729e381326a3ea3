"""Measure time and memory of every op against its formula and the plain convolution."""
