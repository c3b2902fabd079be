"""Trainer: one way through all stages of a recipe, from a seed or from a checkpoint."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mplus.errors import MPlusError, NonFiniteError
from mplus.hf.decoders.train_model import TrainTokenizer, choose_trained
from mplus.hf.model.installed import WrappedModel
from mplus.training.activations.managed import ActivationPlan
from mplus.training.checkpoint import Checkpoint, CheckpointStore, RunIdentity, as_json, random_state, set_random_state
from mplus.training.curriculum import Curriculum
from mplus.training.decoder import make_streams, set_sizes
from mplus.training.metrics import MetricsLine, MetricsLog, RunningMeans, stage_bar
from mplus.training.optimizer import clip_gradients, make_optimizer, make_schedule, optimizer_state
from mplus.training.parallel import (
    Accelerator,
    full_tensor,
    is_sharded,
    rank,
    shard_like,
    sum_over_processes,
    world_size,
)
from mplus.training.recipe.files import parse_recipe
from mplus.training.recipe.recipe import Recipe, Stage
from mplus.training.setup import derive_seed, make_model, make_source
from mplus.training.stage_data import StageData
from mplus.training.state import History, Own, Position, Shared, StageSummary, TrainerState
from mplus.training.step import TrainingStep, Validator


class MissedGoal(MPlusError, RuntimeError):
    """A stage did not reach what it was to reach."""


class Trainer:
    """Trains one decoder from one seed.

    Args:
        recipe: what to do.
        number: 0, and one more with every restart; the seed depends on it.
        accelerator: places and wraps the decoder.
        tokenizer: or None.
        log: takes the metrics; None in processes other than the first.
        store: takes the checkpoints; None: none are written.
        progress: show a bar; None: on a terminal.

    Attributes:
        trained: parameters that are trained -> their names.
        sharded: whether each process holds only a part of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        number: int,
        accelerator: Accelerator,
        tokenizer: TrainTokenizer | None,
        log: MetricsLog | None,
        store: CheckpointStore | None,
        progress: bool | None,
    ) -> None:
        self.recipe, self.number, self.store = recipe, number, store
        self.seed = recipe.seed if not number else derive_seed(recipe.seed, "attempt", number)
        self.state, self.means = TrainerState(), RunningMeans()
        self.stage_data: StageData | None = None
        self.history = History(seeds=[self.seed])
        self._accelerator, self._tokenizer, self._log, self._progress = accelerator, tokenizer, log, progress
        self._begin_model()
        self._validator = None
        if recipe.validation is not None:
            self._validator = Validator(recipe, recipe.validation, tokenizer)
        # Weights were drawn alike in all processes; dropout must not be.
        torch.manual_seed(derive_seed(self.seed, "process", rank()))
        self._saved_at = time.monotonic()

    def _begin_model(self) -> None:
        options = self.recipe.optimizer
        model = make_model(self.recipe, self.seed, self._tokenizer).train()
        self._memory = model.mplus_config
        self._base = None if self.recipe.model.build is not None else model.mplus_installed.base_digest
        trained = choose_trained(model, options.parameters)
        self._shapes = {name: list(parameter.shape) for name, parameter in trained.items()}
        plan = None
        if options.activations != "keep":
            plan = ActivationPlan(options.activations, options.swapped_share, options.host_bytes)
        step = TrainingStep(model, getattr(torch, options.dtype), plan)
        optimizer = make_optimizer(trained, options)
        self._wrapped, prepared = self._accelerator.prepare(step, optimizer)
        # Under DDP the step is wrapped; FSDP2 shards it in state, and the optimiser gets the shards.
        wrapped = self._wrapped.module if isinstance(self._wrapped, DistributedDataParallel) else self._wrapped
        self.step = cast("TrainingStep", wrapped)
        self.optimizer: torch.optim.Optimizer = getattr(prepared, "optimizer", prepared)
        self._share = make_schedule(options, options.schedule_steps or self.recipe.falling_steps)
        # Taken once: after a forward without backward a sharded module shows whole weights as its parameters.
        self.trained: dict[nn.Parameter, str] = {
            p: name for name, p in self.model.named_parameters() if p.requires_grad
        }
        self.sharded = any(is_sharded(parameter) for parameter in self.trained)

    @property
    def model(self) -> WrappedModel:
        """The wrapped decoder."""
        return self.step.model

    @property
    def stage(self) -> Stage:
        """The stage it is in."""
        return self.recipe.stages[self.state.stage]

    def run(self) -> None:
        """Train to the end.

        Raises:
            MissedGoal: a stage that must reach something did not.
            NonFiniteError: the loss or a gradient is NaN or infinite.
            CheckpointError: a checkpoint could not be written.
        """
        while self.state.stage < len(self.recipe.stages):
            self._run_stage()

    def _run_stage(self) -> None:
        stage, state = self.stage, self.state
        if self.stage_data is None:
            self.stage_data = self._make_stage_data(stage)
            state.recent = deque(maxlen=stage.until.window if stage.until is not None else 0)
        title = f"{stage.name} ({state.stage + 1}/{len(self.recipe.stages)})"
        wanted = self._progress if rank() == 0 else False
        reached = False
        with stage_bar(title, state.stage_step, stage.steps, wanted) as advance:
            while state.stage_step < stage.steps and not reached:
                begun = time.monotonic()
                reached = self._one_step(stage)
                state.seconds += time.monotonic() - begun
                advance(self._report(last=reached or state.stage_step == stage.steps))
                if not reached and state.stage_step < stage.steps:
                    self._checkpoint_if_due()
        self._end_stage(stage, reached)

    def _end_stage(self, stage: Stage, reached: bool) -> None:
        state = self.state
        summary: StageSummary = {"name": stage.name, "steps": state.stage_step}
        if stage.until is not None:
            value = sum(state.recent) / max(len(state.recent), 1)
            summary = {**summary, "metric": stage.until.metric, "value": value, "reached": reached}
            if not reached and stage.on_failure != "continue":
                raise MissedGoal(
                    f"stage {stage.name!r} must reach {stage.until.metric} {stage.until.at_least:g} within "
                    f"{stage.steps} steps, got {value:.3f} (seed {self.seed})"
                )
        assert self.stage_data is not None  # noqa: S101  (the stage was begun)
        skipped = self.stage_data.skipped()
        if skipped:
            summary["skipped"] = skipped
        state.stages.append(summary)
        state.stage, state.stage_step = state.stage + 1, 0
        self.stage_data = None
        set_sizes(self.model.mplus_engine, self._memory, {})  # those that it is saved with
        self.save()

    def _make_stage_data(self, stage: Stage) -> StageData:
        count = stage.streams or self.recipe.streams
        numbers = range(rank() * count, (rank() + 1) * count)
        names = sorted({str(entry.data) for entry in stage.objectives if entry.data is not None})
        where = (self.seed, self.state.stage)
        set_sizes(self.model.mplus_engine, self._memory, stage.memory)
        return StageData(
            stage,
            make_streams(
                self.model.mplus_engine, numbers, seed=derive_seed(*where, "streams"), long_term=stage.long_term
            ),
            {
                name: make_source(
                    self.recipe.data[name],
                    tokenizer=self._tokenizer,
                    numbers=numbers,
                    seed=derive_seed(*where, "data", name),
                )
                for name in names
            },
            Curriculum(stage, derive_seed(*where, "curriculum")),
        )

    def _one_step(self, stage: Stage) -> bool:
        """Do one step, and return whether the stage has reached what it waits for."""
        assert self.stage_data is not None  # noqa: S101  (the caller began the stage)
        state, curriculum = self.state, self.stage_data.curriculum
        plan = curriculum.plan(state.stage_step)
        main, terms = self.stage_data.terms(plan)
        loss, metrics = self._wrapped(self.stage_data.streams, terms)
        self.optimizer.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        norms = clip_gradients(self.optimizer, self.recipe.optimizer.clip)
        value = loss.item()
        # Before the optimiser steps: a number that is not finite must not get into the weights.
        self._check_finite(stage, [value, *norms.values()], terms[0].label)
        share = self._share(state.step, self._fallen())
        for group in self.optimizer.param_groups:
            group["lr"] = group["top_rate"] * share
        self.optimizer.step()
        curriculum.record(plan, main)
        state.stage_step += 1
        state.step += 1
        self.means.add({"total_loss": value, **self._group_metrics(norms), **metrics, **self.step.activation_metrics()})
        return self._reached(stage, metrics)

    def _group_metrics(self, norms: dict[str, float]) -> dict[str, float]:
        """Return gradient norm and learning rate, those of a mechanism's module with its name behind."""
        found: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            behind = f"_{group['module']}" if group["module"] else ""
            found |= {f"gradient_norm{behind}": norms[group["module"]], f"learning_rate{behind}": group["lr"]}
        return found

    def _fallen(self) -> int:
        """Return the number of steps that the schedule has done.

        A stage that ended early counts in full, so that the last step has the lowest rate.
        """
        if self.recipe.optimizer.schedule_steps is not None:
            return self.state.step
        return self.recipe.falling_steps_before(self.state.stage, self.state.stage_step)

    def _check_finite(self, stage: Stage, values: list[float], label: str) -> None:
        # Summed over processes, so that all of them stop at the same step.
        bad = float(not all(map(math.isfinite, values)))
        if not sum_over_processes([bad])[0]:
            return
        kept = [] if self.store is None else self.store.all()
        raise NonFiniteError(
            f"the loss and its gradient must be finite, got {values[0]:g} and gradient norms "
            f"{', '.join(f'{norm:g}' for norm in values[1:])} at step {self.state.step + 1} (stage {stage.name!r}, "
            f"step {self.state.stage_step + 1}, objective {label}); the step was not taken, "
            + (f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written")
            + ": lower learning_rate or clip"
        )

    def _reached(self, stage: Stage, metrics: dict[str, float]) -> bool:
        until, recent = stage.until, self.state.recent
        if until is None:
            return False
        value = metrics.get(until.metric)
        total, count = sum_over_processes([value or 0.0, float(value is not None)])
        if count:
            recent.append(total / count)
        return len(recent) == until.window and sum(recent) / len(recent) >= until.at_least

    def _report(self, *, last: bool) -> dict[str, float] | None:
        """Write metrics and validate, where it is time to."""
        state, metrics = self.state, None
        if last or state.step % self.recipe.metrics.every_steps == 0:
            metrics = self.means.reduce()
            self._record({**metrics, "seconds": state.seconds})
        validation = self.recipe.validation
        at_end = last and state.stage == len(self.recipe.stages) - 1
        due = validation is not None and (at_end or state.step % validation.every_steps == 0)
        if due and self._validator is not None:
            self._record(self._validator.run(self.step))
        return metrics

    def _record(self, metrics: dict[str, float]) -> None:
        if self._log is not None:
            where: MetricsLine = {"attempt": self.number, "step": self.state.step, "stage": self.stage.name}
            self._log.write({**where, **metrics})

    def _checkpoint_if_due(self) -> None:
        options = self.recipe.checkpoints
        due = options.every_steps is not None and self.state.step % options.every_steps == 0
        if options.every_minutes is not None:
            late = time.monotonic() - self._saved_at >= 60 * options.every_minutes
            due = bool(sum_over_processes([float(late and rank() == 0)])[0]) or due  # all save at the same step
        if due:
            self.save()

    @property
    def facts(self) -> RunIdentity:
        """Return the identity of this run, which its checkpoints are compared with."""
        recipe = as_json(self.recipe.to_dict())
        return RunIdentity(recipe=recipe, base=self._base, shapes=self._shapes, processes=world_size())

    def save(self) -> None:
        """Write a checkpoint, where there is a state for them. Raises CheckpointError."""
        if self.store is None:
            return
        state, names = self.state, self.trained
        shared: Shared = {
            "weights": {name: full_tensor(parameter).detach().cpu() for parameter, name in names.items()},
            "optimizer": optimizer_state(self.optimizer, names),
        }
        position: Position = {
            "attempt": self.number,
            "seed": self.seed,
            "seeds": self.history.seeds,
            "missed": self.history.missed,
            "spent": self.history.spent,
            "stage": state.stage,
            "stage_step": state.stage_step,
            "step": state.step,
            "seconds": state.seconds,
            "stages": state.stages,
            "recent": list(state.recent),
        }
        self.store.save(f"{self.number:02d}-{state.step:09d}", self.facts, position, shared, self._own())
        self._saved_at = time.monotonic()

    def _own(self) -> Own:
        found: Own = {"random": random_state(), "means": self.means.sums, "stage_data": None}
        if self.stage_data is not None:
            found["stage_data"] = self.stage_data.state_dict()
        return found

    def load(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint. Raises CheckpointError when it is of another recipe or model."""
        # The recipe is read anew: an option that there was not when it was saved has its default.
        recipe = as_json(parse_recipe(saved.manifest["recipe"]).to_dict())
        self.facts.check({**saved.manifest, "recipe": recipe}, saved.folder)
        position, state, names = saved.manifest, self.state, self.trained
        state.stage, state.stage_step, state.step = position["stage"], position["stage_step"], position["step"]
        state.seconds, state.stages = position["seconds"], position["stages"]
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(shard_like(saved.shared["weights"][name], parameter))
                moments = saved.shared["optimizer"].get(name)
                if moments is not None:
                    self.optimizer.state[parameter] = {
                        key: shard_like(value, parameter) if value.ndim else value for key, value in moments.items()
                    }
        own = saved.own
        self.means.sums = own["means"]
        if own["stage_data"] is not None:
            stage = self.stage
            self.stage_data = self._make_stage_data(stage)
            self.stage_data.load_state_dict(own["stage_data"])
            state.recent = deque(position["recent"], maxlen=stage.until.window if stage.until is not None else 0)
        set_random_state(own["random"])
