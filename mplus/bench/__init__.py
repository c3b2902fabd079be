"""What reading and writing cost, measured side by side with plain implementations in one process."""
