"""Published benchmarks as query sources, with their official scoring."""
