"""DecoderSource: the decoder that an engine is to load, as plain data; torch is loaded with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define

from mplus.serving.config import ServeConfig

if TYPE_CHECKING:
    from mplus.serving.engine.decoder import ServedDecoder


@define(frozen=True)
class DecoderSource:
    """The decoder that an engine loads; see ``ServedDecoder.load``.

    Attributes:
        model: name or folder.
        mechanism: of memories; None: as saved, else "kv".
        served_name: what clients call it; None: as ``model``.
        threads: of torch; None: as torch has it.
    """

    model: str
    mechanism: str | None = None
    served_name: str | None = None
    threads: int | None = None

    def load(self, config: ServeConfig) -> ServedDecoder:
        """Load it in this process. Raises as ``ServedDecoder.load``."""
        import torch

        from mplus.serving.engine.decoder import ServedDecoder

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return ServedDecoder.load(self.model, config.memories, mechanism=self.mechanism, served_name=self.served_name)
