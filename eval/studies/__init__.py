"""Studies of what was trained."""
