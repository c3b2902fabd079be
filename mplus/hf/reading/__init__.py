"""Reading a memory, from a call of the decoder to what each layer sees in front of the text.

- ``arguments.py``: what a call asks for; ``open_readings.py`` and ``generating.py``: what it reads if it does not say.
- ``generation.py`` and ``forward.py``: ``generate`` and ``forward``; ``pieces.py``: a text that is read in pieces.
- ``reading.py``: the snapshot that a call reads; ``retrieval.py``: when its layers retrieve, and with which tokens;
  there ``ReadSource.prefix`` asks the mechanism what a layer sees.
- ``caches.py`` and ``checks.py``: whether a key/value cache goes on under the same memory and weights, and its text.
- ``many``: a reading of many memories at once.
- ``override.py``: reading as if the decoder had been wrapped otherwise; ``generation_config.py``: a memory among the
  settings of transformers.
"""
