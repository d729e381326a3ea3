"""Code shared by several operators."""
