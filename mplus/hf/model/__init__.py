"""The wrapped decoder: wrap and unwrap, its class, and the engine behind its memories."""
