"""Public data sets in the formats that MMDetection reads."""
