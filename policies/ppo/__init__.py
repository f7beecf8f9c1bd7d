"""The controller as a policy of Stable-Baselines3."""
