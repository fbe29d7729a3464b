"""A run: its settings, what is refused before it, its folder, its commands and its report."""
