"""Run a detector, given by a config and a checkpoint, on images."""
