"""From a config and a checkpoint to a detector that runs on images."""
