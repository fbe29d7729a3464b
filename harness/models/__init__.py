"""Models: weights, what an architecture can do, processes, the memory estimate."""
