"""Merging: what another memory holds, taken into a memory as one change."""
