"""The memories of many streams as dense tensors, for training."""
