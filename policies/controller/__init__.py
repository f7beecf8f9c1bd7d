"""The two-level controller, what it decides, and how it is saved."""
