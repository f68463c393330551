"""Files of instances and of labels: which there are, reading what may be broken, matching of positions, packing."""
