"""What is measured of the students on text they did not learn from."""
