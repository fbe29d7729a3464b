"""Everything around the method, in four rooms. Not needed to understand SELM."""
