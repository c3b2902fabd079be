"""A memory as one stream of bytes: exported as a snapshot, and checked from end to end before it is imported.

The stream is a tar of three plain files, in this order:

- ``rows-<hex>.safetensors`` and ``manifest.json``: a saved memory (``mplus.memory.format.save``). What ``tar`` unpacks
  is a folder that ``Memory.load`` reads. The name comes from the header of the tensors, and not from their values:
  these are known only once they have been written.
- ``SHA256SUMS``: digests of both, as ``sha256sum`` writes and checks them.

The same memory gives the same bytes: there are no times and no owners, and every byte between files is given. Other
members, other kinds of them (links, devices, folders) and other paths are refused, and so is any other byte.
"""
