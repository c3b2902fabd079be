"""Order of streams and events around copies on a GPU, seen with streams that only write down what they are told."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from mplus.training.activations.host_copies import MOST_PENDING, HostCopies

DEVICE = torch.device("cpu")


class Event:
    def __init__(self, name, log, done=False):
        self.name, self.log, self.done = name, log, done

    def query(self):
        return self.done

    def synchronize(self):
        self.log.append(f"wait on the host for {self.name}")


class Stream:
    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")

    def record_event(self):
        self.events += 1
        self.log.append(f"{self.name} records {self.name} {self.events}")
        return Event(f"{self.name} {self.events}", self.log)


def unpinned(empty, *args, pin_memory=False, **kwargs):
    return empty(*args, **kwargs)


@pytest.fixture
def seen(monkeypatch):
    """Return what happens, in order, and copies between streams "out" and "back" beside "compute"."""
    log: list[str] = []
    compute, plain = Stream("compute", log), torch.Tensor.copy_

    @contextmanager
    def current(stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    def copied(self, other, non_blocking=False):
        log.append("copy")
        return plain(self, other)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch, "empty", partial(unpinned, torch.empty))
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(f"used by {stream.name}"))
    return log, HostCopies(DEVICE, Stream("out", log), Stream("back", log))


def test_a_copy_waits_for_the_computation_and_its_original_for_the_copy(seen):
    log, copies = seen
    original = torch.arange(3.0)
    made = copies.copy(original)
    assert log == ["out waits for compute", "on out", "copy", "out records out 1", "off out", "used by out"]
    assert copies._originals == [original]
    assert torch.equal(made.numbers, original)


def test_what_comes_back_is_waited_for_before_it_is_used(seen):
    log, copies = seen
    made = copies.copy(torch.arange(3.0))
    log.clear()
    copies.prefetch(made)
    copies.prefetch(made)
    assert log == ["back waits for out 1", "on back", "copy", "back records back 1", "off back"]
    log.clear()
    assert torch.equal(copies.fetch(made), torch.arange(3.0))
    assert log == ["compute waits for back 1", "used by compute"]


def test_originals_of_few_layers_are_held(seen):
    log, copies = seen
    for layer in range(MOST_PENDING + 1):
        copies.copy(torch.zeros(2))
        copies.layer_done()
        assert copies._originals == []
        assert len(copies._pending) == min(layer + 1, MOST_PENDING)
    assert log[-1] == "wait on the host for out 2"


def test_on_a_cpu_a_copy_is_another_tensor():
    copies, original = HostCopies.of(DEVICE), torch.arange(6.0).view(2, 3)
    made = copies.copy(original.T)
    numbers = copy.deepcopy(made.numbers)
    original.zero_()
    assert torch.equal(copies.fetch(made), numbers)
    assert made.numbers.is_contiguous()
