"""Text that comes with the engine: a generator of child-directed English."""
