"""Many texts at once, each with a memory of its own, in one step of a plain decoder.

- ``batch_reader.py``: ``BatchReader``, rows that join, step and leave.
- ``requests.py``: what a row asks for (``RowRequest``) and what it is (``Row``).
- ``joining.py``: prompts on their way; ``prompts.py``, ``joint_prompts.py``, ``pieces.py``: how they are read, each as
  ``generate`` would read it alone, several in one forward, a long one in pieces.
- ``stepped_rows.py``: the rows; ``row_buffer.py``: keys and values of those that a plain decoder steps, with room
  behind each; ``wrapped_row.py``: those that it cannot step, one by one through the wrapped decoder,
  and ``slow_reasons.py`` why.
"""
