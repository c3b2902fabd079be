"""Rows of a layer as immutable values: slabs of preallocated blocks that stores and their forks share."""
