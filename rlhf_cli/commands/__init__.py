"""One file per command: config -> objects -> run."""
