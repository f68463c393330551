"""Sources of bags: one module for each kind of data, `source` to find the kind, `inspection` to look at it."""
