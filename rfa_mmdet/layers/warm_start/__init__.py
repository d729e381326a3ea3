"""Warm start: pretrained weights in layers that replace plain convolutions."""
