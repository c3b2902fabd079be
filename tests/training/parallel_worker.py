"""Several processes that train together: ``python -m tests.training.parallel_worker KIND... FOLDER``.

They are forked from one that has imported everything, which takes longer than what they do. The first of them writes
to ``FOLDER/KIND.pt`` the gradient of the first step, the losses of all steps and the trained weights; all leave the run
itself in ``FOLDER/KIND``. The first steps are done, then the run is resumed.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

from mplus.testing.rounding import InFloat64
from mplus.training import train, trainer
from mplus.training.parallel import full_tensor, rank
from tests.training.recipes import recipe

PROCESSES = 2
STEPS = 8
BREAK = 5


def table(streams: int, *, swapped: bool = False) -> dict[str, Any]:
    """Streams differ in how many of their tokens are to be predicted, and in which texts are about something.

    With ``swapped`` the first of three layers holds its activations in host memory, and is run again for half of them.
    """
    held = {"optimizer__activations": "memo", "optimizer__swapped_share": 0.5} if swapped else {}
    return recipe(
        **held,
        model__build__num_hidden_layers=3,
        streams=streams,
        data__many__unknown=0.4,
        data__many__language={"relations": 5, "firsts": 8, "lasts": 8},
        data__one__language={"relations": 5, "firsts": 8, "lasts": 8},
        stages__0__steps=3,
        stages__1__steps=STEPS - 3,
        metrics__every_steps=1,
        checkpoints__every_steps=BREAK,
        optimizer__learning_rate=1e-3,
        validation={"every_steps": 4, "steps": 2, "objectives": [{"name": "multi_chunk", "data": "many"}]},
    )


def accelerator(kind: str) -> Any:
    """Of accelerate, as its launcher would set it up."""
    AcceleratorState._reset_state()
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    made = Accelerator(cpu=True, mixed_precision="no", kwargs_handlers=[unused])
    if kind == "fsdp2":  # which accelerate sets up on GPUs only, though its code runs on CPUs as well
        PartialState().distributed_type = made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
        )
    return made


class Watch:
    """Keeps the gradient of the first step, and losses by step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self._clip, self._step = trainer.clip_gradients, trainer.Trainer._one_step

    def __enter__(self) -> Self:
        watch = self

        def one_step(attempt: Any, stage: Any) -> bool:
            names = attempt.trained

            def clip_gradients(optimizer: Any, largest: Any) -> list[float]:
                if not watch.gradients:
                    watch.gradients = {
                        name: full_tensor(parameter.grad).clone()
                        for parameter, name in names.items()
                        if parameter.grad is not None
                    }
                return watch._clip(optimizer, largest)

            trainer.clip_gradients = clip_gradients
            return watch._step(attempt, stage)

        trainer.Trainer._one_step = one_step
        return self

    def __exit__(self, *_: object) -> None:
        trainer.clip_gradients, trainer.Trainer._one_step = self._clip, self._step


class Stopped(Exception):
    """As if the processes had been killed."""


def exact_gradients(folder: Path, streams: int) -> dict[str, torch.Tensor]:
    """The gradient of the first step, computed in float64 from the same weights."""
    make, choose = trainer.make_model, trainer.choose_trained

    def choose_wide(model: Any, parameters: Any) -> dict[str, torch.nn.Parameter]:
        with InFloat64():  # else what is trained would be made float32 again
            return choose(model, parameters)

    with (
        Watch() as watch,
        mock.patch.multiple(trainer, make_model=lambda *of: make(*of).double(), choose_trained=choose_wide),
    ):
        one_step = trainer.Trainer._one_step

        def first_step(attempt: Any, stage: Any) -> None:
            with InFloat64():
                one_step(attempt, stage)
            raise Stopped

        with mock.patch.object(trainer.Trainer, "_one_step", first_step), suppress(Stopped):
            train(table(streams), out=folder, progress=False)
    return watch.gradients


def watched(folder: Path, streams: int, made: Any) -> dict[str, Any]:
    """Train until ``BREAK``, resume, and tell what came of it."""
    with Watch() as watch:
        original = trainer.Trainer._one_step

        def one_step(attempt: Any, stage: Any) -> bool:
            if attempt.state.step == BREAK:
                raise Stopped
            return original(attempt, stage)

        trainer.Trainer._one_step = one_step
        with suppress(Stopped):
            train(table(streams, swapped=made is not None), out=folder, accelerator=made, progress=False)
        trainer.Trainer._one_step = original
        result = train(table(streams, swapped=made is not None), resume=folder, accelerator=made, progress=False)
    return {
        "gradients": watch.gradients,
        "losses": [record["total_loss"] for record in result.records if "total_loss" in record],
        "validation": [r["validation/multi_chunk/loss"] for r in result.records if "validation/multi_chunk/loss" in r],
        "weights": {name: tensor.clone() for name, tensor in result.model.state_dict().items()},
    }


def main() -> None:
    """Start the processes and wait for them; 1 if one of them failed."""
    torch.set_num_threads(1)  # so that nothing has started threads, which a forked process would wait for
    started = []
    for number in range(PROCESSES):
        process = os.fork()
        if not process:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(PROCESSES))
            train_together(*sys.argv[1:])
            return
        started.append(process)
    statuses = [os.waitpid(process, 0)[1] for process in started]
    sys.exit(int(any(statuses)))


def train_together(*arguments: str) -> None:
    """Train in every way asked for."""
    *kinds, folder = arguments
    for kind in kinds:
        made = accelerator(kind)
        found = watched(Path(folder) / kind, 4 // int(os.environ["WORLD_SIZE"]), made)
        if rank() == 0:
            torch.save(found, Path(folder) / f"{kind}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
