"""What all tests share: one thread per worker, long modes on request, Hypothesis without a clock, short collections."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.modes import NIGHTLY
from tests.serving import browser

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read by torch when it is imported: several workers with a thread per core each would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadlines and no complaints about slowness: how fast a machine is must not decide whether a test passes.
_CLOCKLESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", settings(**_CLOCKLESS))
settings.register_profile("ci", settings(**_CLOCKLESS, derandomize=True))
settings.register_profile("nightly", settings(**_CLOCKLESS, max_examples=2000))
settings.load_profile("nightly" if NIGHTLY else "ci" if "CI" in os.environ else "default")


def pytest_report_header() -> str | None:
    """Say where tests/serving/page cannot look at the page in a browser."""
    lacking = browser.missing()
    return f"no browser tests, for want of {' and '.join(lacking)}: make test-serving" if lacking else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked ``nightly`` out unless MPLUS_NIGHTLY is set."""
    if NIGHTLY:
        return
    long = [item for item in items if item.get_closest_marker("nightly")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture(autouse=True)
def _proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `wrap` proves of a decoder is proved once for equal decoders; at night every time."""
    if not NIGHTLY:
        from tests.helpers import proofs  # imports torch, which reads OMP_NUM_THREADS then

        proofs.patch(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What mplus keeps in the user's cache folder stays out of it, unless a run says which one to use."""
    with pytest.MonkeyPatch.context() as patch:
        if "MPLUS_CACHE" not in os.environ:
            patch.setenv("MPLUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _time_stands_still() -> Iterator[None]:
    """Memories without a clock of their own are equal whenever they were written."""
    from tests.helpers import clock  # imports torch, as above

    with pytest.MonkeyPatch.context() as patch:
        clock.stop(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _stays_frozen() -> Iterator[None]:
    """What measures times would thaw, when it ends, what ``pytest_collection_finish`` has frozen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A command that sets the number of torch's threads sets it for its own test only."""
    import torch  # not earlier, as above

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _accelerate_collects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training of a test would end in garbage collections of all that a run of tests holds, seconds each."""
    memory = sys.modules.get("accelerate.utils.memory")
    if memory is not None and not NIGHTLY:
        monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while modules are imported: there is little of it, and much to be looked through."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection: there is so much that each takes a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let it be collected at the end: extension modules complain of what is left."""
    gc.unfreeze()
