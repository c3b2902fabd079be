"""Parts of the store ``tiered``: caches of rows above a store that has them all."""
