"""A server on Ray: `make test-serving` alone runs these, as each engine takes 600 MiB and half a minute to start."""

from __future__ import annotations

import importlib.util
import os

import pytest

collect_ignore = [] if os.environ.get("MPLUS_RAY") and importlib.util.find_spec("ray") else ["test_ray.py"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from benchmarks.serving.ray_owner import serve

    with serve(tmp_path_factory.mktemp("ray") / "memories", "--engines", "2", "--waiting", "64") as running:
        running.wait_for(2)
        yield running
