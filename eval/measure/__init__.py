"""Accuracy, FLOPs and time of policies."""
