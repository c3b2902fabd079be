"""Write a mechanism: keep what every layer received for each token, and let later text attend to all of it."""

from importlib.resources import files

import torch
from attrs import evolve
from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus
from mplus.mechanisms import MECHANISMS, Absorbed, MemoryMechanism, MemoryRows, Update, side_by_side


class TokenMemory(MemoryMechanism):
    """Says what a chunk leaves (write), where it is kept (absorb), and what a layer sees of it (prefix)."""

    name, keeps = "tokens", frozenset({"hidden"})

    def write(self, decoder, views, text):
        return Update(decoder.run(text.ids, adapter="write", collect={"inputs"}).inputs)  # per layer [B, n, d]

    def absorb(self, state, update, source, context):
        count = update.hidden[0].shape[0]
        births, sources = torch.arange(state.clock, state.clock + count), torch.full((count,), source)
        for layer, hidden in enumerate(update.hidden):
            context.store.append(layer, MemoryRows(hidden, births, sources))
        return Absorbed(evolve(state, clock=state.clock + count), dropped=0, evicted=max(context.evict()))

    def prefix(self, opened, layer, found, hidden, project):
        rows = [view.store.gather(layer, view.store.ids(layer)).need_hidden().to(hidden) for view in opened.views]
        return (project(side_by_side(rows)),)

    def prefix_rows(self, view):
        return view.store.count(0)


MECHANISMS.register("tokens", TokenMemory)  # a package announces it in the entry-point group "mplus.mechanisms"
name = str(files("mplus") / "data" / "stories260K")  # or any decoder on the Hugging Face Hub
model = mplus.wrap(AutoModelForCausalLM.from_pretrained(name), mplus.MPlusConfig(mechanism="tokens", adapters=None))
memory = model.new_memory(tokenizer=(tokenizer := AutoTokenizer.from_pretrained(name)))
memory.write("Once upon a time there was a dragon. His name was Ignatius.", source="tale")
print(memory, model(**tokenizer("The dragon", return_tensors="pt"), memory=memory).logits.shape)
