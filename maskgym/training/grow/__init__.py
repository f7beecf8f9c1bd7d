"""Growing the backbone ``small`` on a GPU: a vision tower from nothing, and low-rank deltas of a published language
model.

What plans do is computed densely here, by gates: on a GPU a batch of rows with different plans is faster in full than
in pieces. The answers are those of the engine (``backbones``), to rounding.
"""
