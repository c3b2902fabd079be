"""agree: all engines of a server have the same decoder, or those that differ do not start."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from mplus.config import JsonValue
from mplus.errors import MemoryMismatchError


def agree(folder: Path, server: str, fingerprint: Mapping[str, JsonValue]) -> None:
    """Compare an engine's decoder with that of the first engine of its server, which says here what it has.

    Args:
        folder: of all memories, which the engines share.
        server: an id of the running server; with the next start, another decoder may be served.
        fingerprint: of the decoder, as ``Engine.fingerprint`` returns it: what memories depend on.

    Raises:
        MemoryMismatchError: they differ; memories that one engine writes could not be read by the other.
    """
    file, draft = folder / f".engines-{server}.json", folder / f".engines-{secrets.token_hex(8)}.draft"
    draft.write_text(json.dumps(dict(fingerprint)), encoding="utf-8")
    try:
        os.link(draft, file)  # as a whole, and once
    except FileExistsError:
        first = json.loads(file.read_text(encoding="utf-8"))
        other = sorted(name for name in {*first, *fingerprint} if first.get(name) != fingerprint.get(name))
        if other:
            raise MemoryMismatchError(
                f"this engine's decoder differs from that of the server's first engine in {', '.join(other)}: all "
                "machines must load the same saved folder"
            ) from None
    finally:
        draft.unlink()
