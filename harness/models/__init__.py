"""Models: weights on disk, what an architecture allows, processes, the memory estimate."""
