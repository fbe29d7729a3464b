"""What comes in: preference records, chat templates, samples of another engine, the toy world."""
