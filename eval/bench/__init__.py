"""Speed and memory of the engine."""
