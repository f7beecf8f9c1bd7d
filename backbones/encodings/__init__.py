"""Queries as tensors: images, visual tokens, what the vision tower says of them."""
