"""``train``: a recipe, from the beginning or from a checkpoint, with restarts, into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from attrs import define
from torch import nn

from mplus.config import JsonValue
from mplus.errors import ConfigError, NotSupported, TrainingError
from mplus.hf.decoders.train_model import TrainTokenizer, choose_trained, save_trained
from mplus.hf.model.installed import WrappedModel
from mplus.training.checkpoint import Checkpoint, CheckpointStore
from mplus.training.metrics import MetricsLine, MetricsLog
from mplus.training.parallel import Accelerator, barrier, full_tensor, rank
from mplus.training.recipe.files import RecipeFile, read_recipe
from mplus.training.recipe.recipe import Recipe
from mplus.training.run_folder import CHECKPOINTS, MODEL, TOKENIZER, RunFolder
from mplus.training.setup import make_model, make_tokenizer
from mplus.training.state import History, StageSummary
from mplus.training.step import isolated_rng
from mplus.training.trainer import MissedGoal, Trainer


@define(eq=False, kw_only=True)
class TrainingResult:
    """A trained decoder, and the course of its training.

    Attributes:
        model: the wrapped decoder, in eval mode.
        tokenizer: or None.
        recipe: as it was followed.
        seed: the recipe's; ``seeds``: those of every trainer, the last one made the model.
        restarts: how often all began anew, because a stage missed its goal.
        missed: what it missed, per restart.
        stages: per stage its name, steps, where it had a goal whether it was reached, and what its data skipped.
        steps: optimiser steps of the last trainer.
        seconds: spent in steps of the last trainer; ``seconds_in_all``: with those before restarts.
        records: lines of metrics.
        folder: of the run, or None.
    """

    model: WrappedModel
    tokenizer: TrainTokenizer | None
    recipe: Recipe
    seed: int
    seeds: list[int]
    restarts: int
    missed: list[str]
    stages: list[StageSummary]
    steps: int
    seconds: float
    seconds_in_all: float
    records: list[MetricsLine]
    folder: Path | None

    @property
    def metrics(self) -> dict[str, float]:
        """The newest value of every metric."""
        found: dict[str, float] = {}
        for record in self.records:
            found.update({name: value for name, value in record.items() if isinstance(value, float)})
        return found

    def to_dict(self) -> dict[str, JsonValue]:
        """Return plain data, without model and records."""
        names = ("seed", "seeds", "restarts", "missed", "stages", "steps", "seconds", "seconds_in_all", "metrics")
        found = {name: getattr(self, name) for name in names}
        return {"recipe": self.recipe.name, **found, "folder": None if self.folder is None else str(self.folder)}


def train(
    recipe: str | Path | Mapping[str, JsonValue] | Recipe | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    seed: int | None = None,
    settings: Mapping[str, JsonValue] | None = None,
    steps: int | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
    accelerator: Accelerator | None = None,
) -> TrainingResult:
    """Train a decoder to use its memory.

    Args:
        recipe: a TOML file, the name of a shipped recipe, or its content; None: that of ``resume``.
        out: folder of the run, empty or not there yet; None: nothing is written.
        resume: folder of a run to go on with, from its newest checkpoint.
        seed: instead of the recipe's.
        settings: dotted path -> value, changes to the recipe (``{"stages.*.steps": 10}``).
        steps: the most steps of each stage.
        dry_run: apply the recipe's table ``dry_run``, which makes everything tiny.
        progress: show a bar; None: on a terminal.
        accelerator: of accelerate; None: a new one, set up by ``accelerate launch`` if that started the program.

    Raises:
        ConfigError, UnknownNameError: the recipe breaks a rule; the message begins with the place.
        CheckpointError: the folder cannot be written, or its checkpoint is damaged or of another recipe or model.
        NonFiniteError: loss or gradient became NaN or infinite; the step was not taken.
        TrainingError: a stage missed its goal, and no restart is left or wanted.
        InputError: a data set is empty or its documents are too short.
    """
    if out is not None and resume is not None:
        raise ConfigError(f"one of out and resume must be given, got {str(out)!r} and {str(resume)!r}")
    found = _read(recipe, resume, {**(settings or {}), **({} if seed is None else {"seed": seed})}, steps, dry_run)
    used = make_accelerator() if accelerator is None else accelerator
    check_accelerator(used)
    try:
        with isolated_rng():
            return _Run(found, out, resume, progress, used).result()
    finally:
        if accelerator is None:
            used.free_memory()  # it keeps what it prepared, those of attempts that failed too


def _read(
    recipe: str | Path | Mapping[str, JsonValue] | Recipe | None,
    resume: str | Path | None,
    settings: Mapping[str, JsonValue],
    steps: int | None,
    dry_run: bool,
) -> RecipeFile:
    if recipe is None:
        if resume is None:
            raise ConfigError("a recipe must be given, or a run to resume, got neither")
        recipe = RunFolder(resume).load_recipe()
    return read_recipe(recipe, settings=settings, steps=steps, dry_run=dry_run)


def make_accelerator() -> Accelerator:
    """Make an accelerator for a ``TrainingStep``: parameters may be unused, and precision is the recipe's."""
    import accelerate

    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    made: Accelerator = accelerate.Accelerator(mixed_precision="no", kwargs_handlers=[unused])
    return made


def check_accelerator(accelerator: Accelerator) -> None:
    """Raise NotSupported for ways of training in parallel that are not supported."""
    kind = accelerator.distributed_type.value
    sharded = kind == "FSDP" and accelerator.is_fsdp2
    if not (sharded or kind in {"NO", "MULTI_CPU", "MULTI_GPU"}):
        raise NotSupported(f"training runs in one process, with DDP or with FSDP2, got {kind}: set fsdp_version to 2")
    if sharded:
        # All processes build the same decoder, so there is nothing to send around.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False


class _Run:
    """One call of ``train``."""

    def __init__(
        self,
        file: RecipeFile,
        out: str | Path | None,
        resume: str | Path | None,
        progress: bool | None,
        accelerator: Accelerator,
    ) -> None:
        self.recipe = file.recipe
        self.progress, self.accelerator = progress, accelerator
        path = out if resume is None else resume
        self.folder = None if path is None else RunFolder(path)
        self.store: CheckpointStore | None = None
        if self.folder is not None:
            self.store = CheckpointStore(self.folder.path / CHECKPOINTS, self.recipe.checkpoints.keep)
        self.saved: Checkpoint | None = None
        if resume is not None and self.store is not None and self.folder is not None:
            self.folder.load_recipe()
            self.saved = self.store.latest()
        elif self.folder is not None:
            if rank() == 0:
                self.folder.create(file.text, self.recipe.to_dict())
            barrier()
        self.seeds: list[int] = []
        self.missed: list[str] = []
        self.spent = 0.0
        self.begun = False

    def result(self) -> TrainingResult:
        """Train; a run that fails before its first step, because no decoder can be made, leaves nothing behind."""
        resumed = self.saved is not None
        try:
            return self._result()
        except BaseException:
            if self.folder is not None and not self.begun and not resumed and rank() == 0:
                self.folder.discard()
            raise

    def _result(self) -> TrainingResult:
        path = None if self.folder is None else self.folder.path
        self.tokenizer = make_tokenizer(self.recipe, None if path is None else path / TOKENIZER)
        self.log = MetricsLog(self.folder if rank() == 0 else None) if rank() == 0 else None
        try:
            trainer = self._train()
        finally:
            if self.log is not None:
                self.log.close()
        model = self._model(trainer)
        if path is not None:
            if rank() == 0:
                save_trained(model, path / MODEL, self.tokenizer, save_base=self.recipe.optimizer.parameters == "all")
            barrier()
        state = trainer.state
        return TrainingResult(
            model=model,
            tokenizer=self.tokenizer,
            recipe=self.recipe,
            seed=self.recipe.seed,
            seeds=self.seeds,
            restarts=len(self.seeds) - 1,
            missed=self.missed,
            stages=state.stages,
            steps=state.step,
            seconds=state.seconds,
            seconds_in_all=self.spent + state.seconds,
            records=[] if self.log is None else self.log.records,
            folder=path,
        )

    def _train(self) -> Trainer:
        """Attempts until one comes through."""
        number = 0 if self.saved is None else self.saved.manifest["attempt"]
        while True:
            trainer = self._make_trainer(number)
            try:
                trainer.run()
                self._note(trainer, finished=True)
                return trainer
            except MissedGoal as error:
                self.missed.append(str(error))
                self.spent += trainer.state.seconds
                stage = trainer.stage
                if stage.on_failure != "restart" or number >= self.recipe.restarts:
                    hint = f"; restarts: {number}" if stage.on_failure == "restart" else ""
                    raise TrainingError(f"{error}{hint}: raise its steps, or set on_failure or restarts") from error
                number += 1

    def _make_trainer(self, number: int) -> Trainer:
        trainer = Trainer(self.recipe, number, self.accelerator, self.tokenizer, self.log, self.store, self.progress)
        saved, self.saved = self.saved, None
        if saved is not None:
            trainer.load(saved)
            self.seeds, self.missed = list(saved.manifest["seeds"])[:-1], list(saved.manifest["missed"])
            self.spent = saved.manifest["spent"]
            if self.log is not None:
                self.log.rewind(number, trainer.state.step)
        self.seeds.append(trainer.seed)
        trainer.history = History(self.seeds, self.missed, self.spent)
        self._note(trainer, begun=not self.begun, resumed_at=None if saved is None else trainer.state.step)
        self.begun = True
        return trainer

    def _note(
        self, trainer: Trainer, *, begun: bool = False, resumed_at: int | None = None, finished: bool = False
    ) -> None:
        if self.folder is None or rank() != 0:
            return
        self.folder.update_run_info(
            seeds=self.seeds,
            begun=begun,
            resumed_at=resumed_at,
            missed=self.missed,
            finished=finished,
            steps=trainer.state.step,
            seconds=trainer.state.seconds,
            tensorboard=self.log is not None and self.log.has_board,
        )

    def _model(self, trainer: Trainer) -> WrappedModel:
        """Return the trained decoder as one whole, in eval mode."""
        if not trainer.sharded:
            return cast("WrappedModel", trainer.model.train(False))
        weights = {name: full_tensor(parameter).detach().cpu() for parameter, name in trainer.trained.items()}
        model = make_model(self.recipe, trainer.seed, self.tokenizer)
        trained: dict[str, nn.Parameter] = choose_trained(model, self.recipe.optimizer.parameters)
        for name, parameter in trained.items():
            parameter.data.copy_(weights[name])
        return cast("WrappedModel", model.train(False))
