"""Models and processors from folders and hubs."""
