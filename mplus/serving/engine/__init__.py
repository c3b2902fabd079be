"""The engine of a server: the decoder, all open memories, and the one loop that writes, reads and generates."""
