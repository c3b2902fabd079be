"""Many texts at once, each with a memory of its own, in one step of a plain decoder.

- ``batch_reader.py``: ``BatchReader``, rows that join, step and leave.
- ``requests.py``: what a row asks for (``RowRequest``) and what it is (``Row``).
- ``prompts.py``: how prompts are read, each as ``generate`` would read it alone.
- ``row_buffer.py``: keys and values of all rows, with room behind each.
- ``wrapped_row.py``: rows that a plain decoder cannot step, one by one through the wrapped decoder.
"""
