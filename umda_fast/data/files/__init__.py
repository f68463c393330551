"""Files of instances and of labels: formats, tables, reading what may be broken, matching of positions, packing."""
