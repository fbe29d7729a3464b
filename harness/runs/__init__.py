"""A run: settings, checks before it, its folder, exits, trackers, report, figures, commands."""
