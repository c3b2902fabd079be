"""The file format of a saved memory: save, load, verify and repair it."""
