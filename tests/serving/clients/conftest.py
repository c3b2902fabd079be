"""The programs of the page about many users, where OpenAI's client is installed: `make test-serving` does that."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("openai") else ["test_clients.py"]
