"""What comes in: preference records, chat templates, another engine's samples, the toy world."""
