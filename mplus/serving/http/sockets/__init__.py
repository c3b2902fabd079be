"""The sockets of a server: listening, connections that may be slow but not for ever, and the end in order."""
