"""The server on Ray Serve: engines on several processes or machines, each memory at one of them."""
