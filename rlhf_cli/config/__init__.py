"""The schema behind every YAML, and its validation."""
