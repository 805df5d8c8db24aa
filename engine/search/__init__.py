"""Searches for the students that learn together, and for hyperparameters by trials that are runs of recipes."""
