"""One training loop for every stage, and what surrounds it."""
