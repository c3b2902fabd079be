"""Measure what mplus costs on this machine, beside plain implementations of the same thing in the same process.

One module per command of ``mplus bench`` (``read``, ``decode``, ``write``, ``score``, ``attention``, ``store``), each
with a function ``measure`` that returns a record. They share

- ``presets`` and ``fixture``: what is measured on, decoders with random weights and memories of random rows;
- ``readers``, ``baselines``, ``attention_variants``: the implementations that are compared;
- ``correctness``: whether each computes the right thing, which is asked before it is timed;
- ``record`` and ``tables``: records, and records as tables.
"""
