"""One training run per stage: objects from the config, the loop, the final figures. Upstream models are given."""
