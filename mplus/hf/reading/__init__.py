"""Reads: one forward or one generation of a wrapped decoder with a memory."""
