"""listen: the socket of a server."""

from __future__ import annotations

import socket

from mplus.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises ConfigError: the port is taken, or there is no such host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"the server cannot listen on {host}:{port}: {error}") from error
