"""What surrounds the method: settings, files of a run, processes, judges, reports. Not needed to
understand SELM."""
