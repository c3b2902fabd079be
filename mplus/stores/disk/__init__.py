"""Rows in files: how they are written, mapped and checked."""
