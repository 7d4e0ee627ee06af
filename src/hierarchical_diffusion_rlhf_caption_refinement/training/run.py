"""What every stage is given: the settings, the processes, the log, and one way to train."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ..data.streams import batch_indices, share
from ..utils.config import Config, FitConfig, Stage
from ..utils.runlog import RunLog
from ..utils.seeding import usable_device, usable_precision
from .engine import Better, Evaluate, Objective, Row, Stop, fit
from .state import TrainState, make_optimizer

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    config: Config
    accelerator: Accelerator
    log: RunLog
    resume: bool
    cache: Path = Path("cache")
    given: dict[str, str] = field(default_factory=dict)
    """What the stage in hand is given, by fingerprint: the data, earlier checkpoints. It resumes on the same alone."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def last(self, stage: Stage) -> Path:
        return self.config.models / f"last_{stage}.pt"

    def state(self, stage: Stage, model: nn.Module, cfg: FitConfig, extra: dict[str, Any] | None = None) -> TrainState:
        """A fresh state, or the stage's last one when resuming; what an earlier run left is cleared otherwise."""
        model.to(self.device)
        state = TrainState(model, make_optimizer(model, cfg), extra=extra or {})
        if self.resume:
            state.restore(self.last(stage))
        elif self.main:
            self.last(stage).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return state

    def batches(self, name: str, cfg: FitConfig, count: int, make: Callable[[int, list[int], slice], T]) -> Callable[[int], Iterator[T]]:
        """First number -> endless `make(batch number, rows of the whole batch, this process's part of them)` from there on."""
        part = share(cfg.batch_size, self.accelerator.process_index, self.accelerator.num_processes)

        def batch(number: int) -> T:
            return make(number, batch_indices(count, cfg.batch_size, number, self.config.seed, name), part)

        return lambda start: map(batch, itertools.count(start))

    def fit(
        self,
        stage: Stage,
        state: TrainState,
        cfg: FitConfig,
        count: int,
        batches: Callable[[int], Iterator[Any]],
        objective: Objective,
        *,
        evaluate: Evaluate,
        better: Better,
        best: Callable[[nn.Module, Row], None],
        stop: Stop | None = None,
        boundary: int = 1,
        held: dict[str, Any] | None = None,
    ) -> TrainState:
        """Train through the engine, with this stage's progress, log and resumable checkpoint."""
        steps = steps_per_epoch(cfg, count, boundary)
        with self.log.stage(stage, cfg.epochs * steps, state.step) as log:
            return fit(
                state,
                batches,
                objective,
                cfg,
                steps_per_epoch=steps,
                accelerator=self.accelerator,
                seed=self.config.seed,
                evaluate=evaluate,
                better=better,
                best=best,
                stop=stop,
                log=log,
                last=self.last(stage),
                boundary=boundary,
                held=(held or {}) | self.given,
            )


def start_accelerator(config: Config, **options: Any) -> Accelerator:
    """On this process's GPU or the processor, in the configured precision where the device has it; `options` are accelerate's."""
    device = usable_device()
    AcceleratorState._reset_state()  # or the first precision of a process, this package's or TRL's, would be that of all its runs
    return Accelerator(cpu=device.type == "cpu", mixed_precision=usable_precision(config.mixed_precision, device), **options)


def steps_per_epoch(cfg: FitConfig, count: int, boundary: int = 1) -> int:
    """Updates that see `epoch_size` examples (0: all `count`), rounded up to whole rollouts."""
    updates = max(1, (cfg.epoch_size or count) // (cfg.batch_size * cfg.grad_accum))
    return -(-updates // boundary) * boundary
