"""Convert public datasets to formats that MMDetection reads."""
