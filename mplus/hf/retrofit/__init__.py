"""How memory gets into a decoder's attention, in the order of one forward.

- ``discovery.py``: where a decoder keeps its layers, attention, norms and rotary embeddings, found when it is wrapped.
- ``context.py``: the pass a thread is in, and the decoder layers that hand it on.
- ``hooks.py``: in front of each attention module, what its layer sees is asked for and handed over;
  ``Retrofit.project`` puts rows through the layer's own norm, projections and rotation.
- ``projection.py``: rows that were projected when they were written; ``positions.py``: where rows sit, and the rotation
  (RoPE) of their keys to there.
- ``attention.py``: the attention functions that take memory as segments; ``memory_cache.py``: memory and text kept as
  one; ``cache_view.py``: for decoders that compute attention by themselves.
- ``attention_probe.py``: a decoder's own queries and keys, for retrievers.
"""
