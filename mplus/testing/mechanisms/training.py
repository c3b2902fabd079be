"""What every mechanism must do in training and in evaluation."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import torch
from torch import nn

from mplus.config import JsonValue
from mplus.errors import ConfigError
from mplus.evaluation.execution import GeneratedAnswers
from mplus.evaluation.options import ArmOptions, RunOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts
from mplus.facts.episodes import recall_tokenizer
from mplus.facts.language import Language
from mplus.hf.adapters.lora import is_addition
from mplus.hf.decoders.train_model import choose_trained
from mplus.hf.model.model_class import MemoryModel
from mplus.mechanisms.base import MemoryMechanism
from mplus.testing.mechanisms.suite import CHUNK, RowSuite
from mplus.training import train
from mplus.training.decoder import make_streams
from mplus.training.recipe.files import read_recipe
from mplus.training.setup import make_model

STEPS = 3
WORDS = "the dragon saw a red ball in the garden and told his friend about it . "

P = ParamSpec("P")
R = TypeVar("R")


class MechanismTraining(RowSuite):
    """The tests of ``MechanismConformance`` that train and evaluate."""

    def recipe(self, folder: Path, **memory: JsonValue) -> dict[str, JsonValue]:
        """Return a recipe of a few steps on a text in ``folder``; ``memory`` are further fields of the memory."""
        (folder / "text.txt").write_text(60 * WORDS)
        data: JsonValue = {
            "kind": "documents",
            "paths": [str(folder / "text.txt")],
            "chunk_tokens": CHUNK,
            "target_tokens": CHUNK,
        }
        return {
            "name": "conformance",
            "streams": 2,
            "model": {"path": "stories260K"},
            "memory": {**self.memory_table(), "adapters": {"rank": 2}, **memory},
            "optimizer": {"parameters": "adapters", "learning_rate": 1e-2, "weight_decay": 0.0},
            "metrics": {"every_steps": 1},
            "checkpoints": {"every_steps": 1, "keep": STEPS},
            "data": {"text": data},
            "stages": [
                {
                    "name": "read",
                    "steps": STEPS,
                    "objectives": [{"name": "single_context", "data": "text", "chunks": 2}],
                }
            ],
        }

    def own_parameters(self, model: nn.Module) -> set[str]:
        """Return the names of the mechanism's own parameters. A retriever has a loss of its own, which is not here."""
        names = (name for name, _ in model.named_parameters())
        return {name for name in names if name.startswith("mplus.") and not name.startswith("mplus.retriever.")}

    @contextmanager
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
        """Count the calls of the mechanism's own methods."""
        calls: Counter[str] = Counter()

        def counting(name: str, method: Callable[P, R]) -> Callable[P, R]:
            def counted(*given: P.args, **named: P.kwargs) -> R:
                calls[name] += 1
                return method(*given, **named)

            return counted

        with monkeypatch.context() as patch:
            for method in ("write", "absorb", "prefix"):
                patch.setattr(self.implementation, method, counting(method, getattr(self.implementation, method)))
            yield calls

    def test_gradients_reach_its_own_parameters_and_nothing_that_is_frozen(self) -> None:
        """Two chunks are written with gradients, and a text is read with them."""
        with self.wrapped(adapters={"rank": 2}) as model:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(is_addition(name))
            streams = make_streams(model.mplus_engine, range(2), seed=0)
            for seed in (1, 2):
                streams.write(torch.stack([self.text(seed), self.text(seed + 10)]), torch.tensor([seed, seed]))
            texts = torch.stack([self.text(7), self.text(8)])[:, None]
            logits = streams.read(texts).logits
            loss = logits[:, :, :-1].log_softmax(-1).gather(-1, texts[:, :, 1:, None]).mean()
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            reached = {name for name, found in gradients.items() if found is not None and bool(found.abs().sum() > 0)}
            assert reached, "nothing can be trained"
            assert self.own_parameters(model) - reached == set()
            assert {name for name in reached if not is_addition(name)} == set()

    def test_it_trains(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Through ``mplus train``: the loss is finite, what is trained changes and nothing else, a run is resumed."""
        with self.registered():
            table = self.recipe(tmp_path)
            with self.counted(monkeypatch) as calls:
                done = train(table, out=tmp_path / "run", progress=False)
            vectorised = self.implementation.streams is not MemoryMechanism.streams
            assert vectorised or {"write", "absorb", "prefix"} <= calls.keys(), f"training calls {dict(calls)} only"
            losses = [float(record["total_loss"]) for record in done.records]
            assert len(losses) == STEPS
            assert all(map(math.isfinite, losses))
            fresh = make_model(read_recipe(table).recipe, done.seed, done.tokenizer)
            before, after = dict(fresh.named_parameters()), dict(done.model.named_parameters())
            changed = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
            assert changed, "nothing was trained"
            assert changed - choose_trained(fresh, "adapters").keys() == set()
            assert self.own_parameters(fresh) - changed == set()

            for newer in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
                shutil.rmtree(newer)  # as if it had been stopped after the first step
            again = train(resume=tmp_path / "run", progress=False)
            resumed = again.model.state_dict()
            assert [
                name for name, value in done.model.state_dict().items() if not torch.equal(value, resumed[name])
            ] == []

    def test_a_training_of_nothing_is_refused_by_name(self, model: MemoryModel, tmp_path: Path) -> None:
        """Without parameters of its own a mechanism trains adapters, and there are none."""
        table = self.recipe(tmp_path, adapters=None)
        if self.own_parameters(model):
            assert read_recipe(table).recipe.memory.adapters is None
            return
        with pytest.raises(ConfigError, match=repr(self.implementation.name)):
            train(table, progress=False)

    def test_it_is_an_arm_of_retention(self, model: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under its own name: it is written, and read when the question is put."""
        language = Language(relations=2, firsts=6, lasts=6)
        task = Facts(language=language, chunk_tokens=CHUNK, ages=(0, 1), streams=2, rounds=1)
        options = RunOptions(ages=(0, 1), streams=2, separator=" ")
        execution = GeneratedAnswers(model, recall_tokenizer(language), task, options=options)
        name = self.implementation.name
        with self.counted(monkeypatch) as calls:
            report = retention(execution, ArmOptions(arms=("none", name)), progress=False)
        by_name = {arm.name: arm for arm in report.arms}
        assert by_name[name].status == "ok"
        assert {"write", "absorb", "prefix"} <= calls.keys()
        for cell, without in zip(by_name[name].cells, by_name["none"].cells, strict=True):
            assert (cell.tokens_attended or 0) > (without.tokens_attended or 0)
