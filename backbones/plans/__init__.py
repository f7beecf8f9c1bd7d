"""Plans: what is kept, and what it costs."""
