"""The generator of child-directed English, the text that comes with the engine."""
