"""Sources of bags: a module for each kind of data, `base` to derive from, `source` to find the kind, `inspection`."""
