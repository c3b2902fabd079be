"""What transformers calls a decoder's cache: reads look for it under that name."""

from __future__ import annotations

import inspect

import transformers
from transformers import GenerationMixin

from mplus.errors import NotSupported

CACHE = "past_key_values"


def check_cache_name() -> None:
    """Raise NotSupported where this transformers has another name for the cache, as from 5.24 on.

    Every step of ``generate`` would be read as a text of its own, and answered wrongly without an error.
    """
    if CACHE not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
        raise NotSupported(
            f"transformers must call a decoder's cache {CACHE!r}, and {transformers.__version__} does not: install a "
            "release that mplus can read, as in: pip install 'transformers<5.24'"
        )
