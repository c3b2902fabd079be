"""A memory that lives in a directory and survives a crash at any instant.

The directory holds, at any time, one **checkpoint** and a **journal** of what happened since:

- ``manifest.json``: what the memory belongs to, and the names, sizes and digests of the files below
  (``checkpoint_manifest.py``);
- ``state-<id>-<n>.safetensors``: short-term and pending rows, sources, counters, generators (a block file, see
  ``mplus.stores.disk``);
- ``rows-<id>-<hex>.safetensors``: long-term rows, block files that never change (``mplus.stores.mmap``);
- ``journal-<id>-<n>.bin``: a record for every chunk written since (``journal.py``, ``record.py``);
- ``lock``: held by the process that writes; says the memory's id, which is in all names above.

A write appends its record to the journal and syncs it before it shows in memory. When the journal has become long,
when the memory is closed, and for every change other than a write (``forget``, ``reset``, weights that changed), a new
checkpoint is written: new files, synced; an empty journal, synced; then the manifest, replaced by a rename that is
synced too. Files of the one before are removed after that. No file that a manifest names is ever written to but
the journal, and that only behind its last record: a crash can tear nothing that was acknowledged.
"""

JOURNAL_BYTES = 2**28
"""Length of a journal from which it is replaced by a checkpoint, where nothing else is asked for."""
