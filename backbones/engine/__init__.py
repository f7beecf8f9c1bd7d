"""Execution of plans on a decoder: what is dropped is not computed."""
