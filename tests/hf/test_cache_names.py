"""A release of transformers that calls the cache something else is refused, before a memory is misread."""

import pytest
from transformers import GenerationMixin, LlamaForCausalLM

import mplus
from mplus.errors import NotSupported


def test_another_name_of_the_cache_is_refused_by_wrap(monkeypatch):
    def prepare(self, input_ids, next_sequence_length=None, cache=None, **kwargs):
        """Take what transformers 5.24 takes."""

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare)
    model = LlamaForCausalLM.__new__(LlamaForCausalLM)  # refused before it is looked at
    with pytest.raises(NotSupported, match="must call a decoder's cache 'past_key_values'"):
        mplus.wrap(model, mplus.MPlusConfig(mechanism="kv"))
