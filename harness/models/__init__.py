"""Models on disk and in memory: weights, what an architecture can do, processes, the memory plan."""
