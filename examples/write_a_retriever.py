"""A retriever of your own: which rows of long-term memory a text brings back.

This one compares hidden states, and nothing in it is trained. The conformance suite of docs/plugins.md says whether a
retriever keeps to the rules; in a package of your own it is found by its name like those of mplus.
"""

from collections import Counter
from importlib.resources import files

from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus
from mplus.retrievers import RETRIEVERS, Retriever, check_selection, top_k


class CosineRetriever(Retriever):
    """Scores a row by its cosine with the word of the text that is most like it."""

    name = "cosine"

    def __init__(self, shape, options=None):
        super().__init__(shape, options)
        self.key_size = shape.hidden_size  # numbers kept with each row, to find it by

    def project_keys(self, layer, hidden):
        return normalize(hidden, dim=-1)  # [rows, width], made once, when a row enters long-term memory

    def project_queries(self, layer, hidden):
        return normalize(hidden, dim=-1)  # [texts, tokens, width], made at every read

    def select(self, layer, queries, query_mask, stores, k):
        check_selection(queries, query_mask, stores, k)
        found = []
        for text, mask, store in zip(queries, query_mask, stores, strict=True):
            cosines = store.column(layer, "key").float() @ text[mask].float().T  # [rows, tokens]
            found.append(top_k(cosines.amax(dim=1), store.ids(layer), k))
        return found


RETRIEVERS.register("cosine", CosineRetriever)

name = str(files("mplus") / "data" / "stories260K")  # or any decoder on the Hugging Face Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
sizes = {"chunk_tokens": 64, "memory_tokens_per_chunk": 8, "short_term_tokens": 16, "retrieved_tokens": 20}
mplus.wrap(model, mplus.MPlusConfig(retriever="cosine", **sizes))

memory = model.new_memory(tokenizer=tokenizer)
memory.write("The dog ran after the ball in the park and barked. " * 30, source="dog")
memory.write("Mom made a cake with milk and sugar in the kitchen. " * 30, source="cake")
for text in ("The dog barked and ran", "The cake is sweet, said Mom"):
    read = tokenizer(text, return_tensors="pt")
    out = model.generate(**read, memory=memory, max_new_tokens=1, output_sources=True, return_dict_in_generate=True)
    print(text, "->", dict(Counter(row.source for layer in out.memory_sources[0] for row in layer)))
