"""Planners around planners."""
