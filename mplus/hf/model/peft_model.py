"""The class of a user's own ``PeftModel`` around a wrapped decoder."""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import Cache

from mplus.hf.adapters.lora import refuse_conflicts
from mplus.hf.model.installed import WrappedModel
from mplus.hf.pretrained.peft_folders import DESCRIPTION, MEMORY, add_to_card, describe_adapters
from mplus.hf.pretrained.save import WEIGHTS, PushToHub, load_additions
from mplus.hf.reading.caches import mark_learned
from mplus.hf.retrofit.context import subclass
from mplus.hf.types import Argument, Output

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = object  # the class that this is mixed into brings its own


class PeftMemoryModel(PushToHub, PeftModel):
    """The methods that a PeftModel around a wrapped decoder has in place of its own."""

    __mplus_base__: ClassVar[type]
    """The class it had before."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, save_base: bool = False, **kwargs: Any
    ) -> None:
        """Save as PEFT does, and what mplus added besides, in ``mplus/``; ``mplus.from_pretrained`` loads both.

        Args:
            save_directory: folder; made where missing.
            args, kwargs: as in PEFT; ``max_shard_size`` and ``tags`` are for the decoder.
            save_base: save the decoder too, in ``mplus/base/``.

        Raises:
            NotSupported: adapters are merged, or have a name of ours.
        """
        refuse_conflicts(self)
        base = cast("type[PeftModel]", type(self).__mplus_base__)
        call = inspect.signature(base.save_pretrained).bind(self, save_directory, *args, **kwargs)
        base.save_pretrained(*call.args, **call.kwargs)
        call.apply_defaults()
        main, names = call.arguments["is_main_process"], call.arguments["selected_adapters"]
        folder, state = Path(save_directory), kwargs.get("state_dict")
        prefix = "base_model." if self.active_peft_config.is_prompt_learning else "base_model.model."
        inner = (
            None
            if state is None
            else {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        )
        shards = {name: kwargs[name] for name in ("max_shard_size", "tags") if name in kwargs}
        decoder = cast("WrappedModel", self.get_base_model())
        decoder.save_pretrained(folder / MEMORY, main, inner, save_base=save_base, **shards)
        if main:
            saved = list(self.peft_config) if names is None else list(names)
            describe_adapters(self, saved, self.active_adapters, folder / MEMORY)
            add_to_card(folder)

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any
    ) -> _IncompatibleKeys:
        """Load as PEFT does; to an adapter that is there, what mplus added comes back as well where it was saved along.

        That is how a trainer goes on from a checkpoint.
        """
        there = adapter_name in self.peft_config
        result: _IncompatibleKeys = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        if there:
            folder = Path(model_id)
            where = (folder if adapter_name == "default" else folder.parent) / MEMORY
            if (where / DESCRIPTION).is_file():
                load_additions(self, load_file(where / WEIGHTS), str(where))
        return result

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Tensor:
        """Return the virtual tokens as PEFT does, embeddings ``[B, v, d]`` or a cache, which is marked as learned."""
        return mark_learned(super().get_prompt(batch_size, task_ids, max_cache_len))


def peft_model_class(base: type[PeftModel]) -> type:
    """Return ``base`` with ``PeftMemoryModel`` mixed in, and a ``forward`` that goes on from a cache."""
    signature = inspect.signature(base.forward)

    @functools.wraps(base.forward)
    def forward(self: PeftModel, *args: Argument, **kwargs: Argument) -> Output:
        cache = cast("Cache | None", kwargs.get("past_key_values"))
        reads = kwargs.get("memory") is not None or getattr(cache, "_mplus_reading", None) is not None
        if reads and self.active_peft_config.is_prompt_learning and cache is not None and cache.get_seq_length():
            return _go_on(self, cache, signature.bind_partial(self, *args, **kwargs))
        output: Output = base.forward(self, *args, **kwargs)
        return output

    return subclass(base, PeftMemoryModel, peft_model_class, forward=forward)


def _go_on(model: PeftModel, cache: Cache, call: inspect.BoundArguments) -> Output:
    """Run a forward of prompt learning behind a cache, which has the virtual tokens already.

    PEFT would drop the cache, or put them in once more.
    """
    _, *named = call.arguments.items()
    inputs = dict(named)
    inputs.update(inputs.pop("kwargs", {}))
    inputs.pop("task_ids", None)
    virtual = model.active_peft_config.num_virtual_tokens
    text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] + virtual == cache.get_seq_length() + text.shape[1]:
        inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], virtual), mask], 1)
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"] + virtual
    output: Output = model.base_model(**inputs)
    return output
