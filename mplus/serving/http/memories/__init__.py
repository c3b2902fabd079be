"""The routes for memories: making and deleting them, what is written to them, and copies."""
