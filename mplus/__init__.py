"""Long-term memory for Hugging Face decoders, kept inside their own hidden states (M+, arXiv 2502.00592)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "BatchReader",
    "Chat",
    "MPlusConfig",
    "Memory",
    "StaticReader",
    "__version__",
    "delete_memory",
    "from_pretrained",
    "memory_bytes",
    "rewrite_memory",
    "unwrap",
    "wrap",
    "write_together",
]

if TYPE_CHECKING:
    from mplus.chat import Chat
    from mplus.config import MPlusConfig
    from mplus.hf.batch.batch_reader import BatchReader
    from mplus.hf.model.static_reader import StaticReader
    from mplus.hf.model.wrapping import unwrap, wrap
    from mplus.hf.pretrained.load import from_pretrained
    from mplus.memory import Memory, write_together
    from mplus.memory.directory.removal import delete_memory
    from mplus.memory.directory.size import memory_bytes
    from mplus.memory.migration.rewrite import rewrite_memory

_LAZY = {
    "Chat": "mplus.chat",
    "MPlusConfig": "mplus.config",
    "Memory": "mplus.memory",
    "write_together": "mplus.memory",
    "delete_memory": "mplus.memory.directory.removal",
    "memory_bytes": "mplus.memory.directory.size",
    "rewrite_memory": "mplus.memory.migration.rewrite",
    "wrap": "mplus.hf",
    "unwrap": "mplus.hf",
    "from_pretrained": "mplus.hf",
    "StaticReader": "mplus.hf.model.static_reader",
    "BatchReader": "mplus.hf.batch.batch_reader",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mplus' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
