"""RAR: a causal transformer trained on random orders that anneal to raster."""
