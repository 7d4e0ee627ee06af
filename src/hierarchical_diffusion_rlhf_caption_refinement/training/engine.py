"""One training loop for every stage: a stage is a stream of batches and an objective."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..utils.checkpoint import CheckpointError
from ..utils.config import FitConfig
from ..utils.interrupt import Interrupted, deferred_interrupts
from ..utils.seeding import seed_global
from .state import TrainState, averaged, update_average

Row = dict[str, Any]
Metrics = Mapping[str, Tensor | float]
Objective = Callable[[nn.Module, Any], tuple[Tensor, Metrics]]
"""(model, wrapped if there are several processes; batch) -> mean loss over this process's examples, named scalars."""
Batches = Callable[[int], Iterator[Any]]
"""First index -> this process's share of each micro-batch from there on; number i depends on the seed and i (rollouts: and the model)."""
Evaluate = Callable[[nn.Module], dict[str, float]]
"""Bare model -> held-out metrics; every process calls it, on the same examples or on equal shares."""
Stop = Callable[[TrainState, Row], str | None]
"""(state, metrics of the update) -> reason to end training; may change `state.extra`."""
Better = tuple[str, Literal["min", "max"]]
"""A metric of the epoch's row and its good direction."""


@runtime_checkable
class Log(Protocol):
    """Is called after every epoch, `update` after every update."""

    def __call__(self, row: Row) -> None: ...
    def update(self, row: Row) -> None: ...


class NonFiniteError(ValueError):
    """A gradient was not finite; the weights are still those of the last good update."""


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass of tensors, batches and other things, with every tensor on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
        return batch
    return dataclasses.replace(batch, **{name: to_device(value, device) for name, value in vars(batch).items()})


def lr_at(step: int, total: int, cfg: FitConfig) -> float:
    """Learning rate of update `step` (from 0) of `total`: linear warm-up, then half a cosine to zero, or flat."""
    warm = round(cfg.warmup * total)
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr if cfg.decay == "constant" else cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


@dataclass(frozen=True)
class _Fit:
    """The arguments of `fit` that its parts share."""

    objective: Objective
    cfg: FitConfig
    steps_per_epoch: int
    accelerator: Accelerator
    seed: int
    evaluate: Evaluate | None
    better: Better | None
    best: Callable[[nn.Module, Row], None] | None
    stop: Stop | None
    log: Log | None

    def mean(self, values: Metrics) -> dict[str, float]:
        """Mean over processes, which must report the same names."""
        if self.accelerator.num_processes == 1 or not values:
            return {name: float(value) for name, value in values.items()}
        row = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.accelerator.device) for v in values.values()])
        return dict(zip(values, cast(Tensor, self.accelerator.reduce(row, "mean")).tolist(), strict=True))

    def gradients(self, model: nn.Module, stream: Iterator[Any], first: int) -> dict[str, float]:
        """Add up the gradients of an update whose micro-batches start at `first`; the means of loss, metrics and gradient norm."""
        count, accelerator = self.cfg.grad_accum, self.accelerator
        found: dict[str, list[Tensor]] = {}
        for i in range(count):
            # Global randomness (dropout) is a function of the micro-batch, so a resumed fit replays it.
            seed_global(accelerator.device, self.seed, "micro-batch", first + i, accelerator.process_index)
            batch = to_device(next(stream), accelerator.device)
            with accelerator.no_sync(model) if i + 1 < count else nullcontext():
                loss, metrics = self.objective(model, batch)
                accelerator.backward(loss / count)
            for name, value in {"loss": loss, **metrics}.items():
                found.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float32, device=accelerator.device).detach())
        norm = accelerator.clip_grad_norm_(model.parameters(), self.cfg.max_grad_norm or math.inf)
        return self.mean({name: torch.stack(values).mean() for name, values in found.items()} | {"grad_norm": torch.as_tensor(norm)})

    def update(self, state: TrainState, model: nn.Module, optimizer: Any, stream: Iterator[Any], lr: float) -> Row:
        """One update of the weights and of their average; its metrics. Raises NonFiniteError."""
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = lr
        row = self.gradients(model, stream, state.step * self.cfg.grad_accum)
        if not math.isfinite(row["grad_norm"]):
            raise NonFiniteError(f"update {state.step + 1}: the gradient is not finite (loss {row['loss']:.4g}); a lower fit.lr may help")
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        if state.ema is not None:
            update_average(state.ema, state.model, state.step, self.cfg.ema_decay)
        for name, value in row.items():
            total, count = state.totals.get(name, (0.0, 0.0))
            state.totals[name] = [total + value, count + 1]
        return {"lr": lr, **row}

    def close_epoch(self, state: TrainState, row: Row) -> None:
        """Evaluate the averaged weights, hand them to `best` if they are, and log the epoch's row."""
        row = row | {name: total / count for name, (total, count) in state.totals.items()} | {"seconds": state.seconds}
        state.totals = {}
        seed_global(self.accelerator.device, self.seed, "evaluate", state.step)
        with averaged(state.model, state.ema), torch.no_grad():
            state.model.eval()
            if self.evaluate:
                row |= self.mean({f"val_{name}": value for name, value in self.evaluate(state.model).items()})
            if self.better and _improves(state.best, row, self.better):
                state.best, state.best_step = row[self.better[0]], state.step
                if self.best and self.accelerator.is_main_process:
                    self.best(state.model, row)
        if self.better and 0 < self.cfg.patience * self.steps_per_epoch <= state.step - state.best_step:
            state.stopped = state.stopped or f"no better {self.better[0]} in {self.cfg.patience} epochs"
        if self.log is not None:
            self.log(row | ({"stopped": state.stopped} if state.stopped else {}))

    def advance(self, state: TrainState, model: nn.Module, optimizer: Any, stream: Iterator[Any]) -> None:
        """One update, and what follows from it: the end of an epoch, of training."""
        total, started = self.cfg.epochs * self.steps_per_epoch, time.perf_counter()
        row = self.update(state, model, optimizer, stream, lr_at(state.step, total, self.cfg))
        row = {"step": state.step, "epoch": math.ceil(state.step / self.steps_per_epoch)} | row
        state.stopped = (self.stop(state, row) if self.stop else None) or ""
        state.seconds += time.perf_counter() - started
        if self.log is not None:
            self.log.update(row)
        if state.stopped or state.step % self.steps_per_epoch == 0:
            self.close_epoch(state, row)
        state.done = bool(state.stopped) or state.step == total


def _improves(record: float | None, row: Row, better: Better) -> bool:
    name, sign = better[0], 1 if better[1] == "max" else -1
    if name not in row:
        raise ValueError(f"no metric {name} to choose the best weights by; there are {', '.join(row)}")
    return math.isfinite(row[name]) and (record is None or sign * row[name] > sign * record)


def _hold_to_plan(state: TrainState, plan: dict[str, Any], last: Path | None) -> None:
    """Raises CheckpointError if the state was trained with other settings: it could not go on as it began."""
    for name, value in plan.items():
        if name != "save_every" and state.plan and state.plan.get(name, value) != value:
            raise CheckpointError(
                f"{last or 'this state'}: was trained with {name}={state.plan.get(name)}, now it is {value}; remove it to start over"
            )
    state.plan = plan


def fit(
    state: TrainState,
    batches: Batches,
    objective: Objective,
    cfg: FitConfig,
    *,
    steps_per_epoch: int,
    accelerator: Accelerator,
    seed: int,
    evaluate: Evaluate | None = None,
    better: Better | None = None,
    best: Callable[[nn.Module, Row], None] | None = None,
    stop: Stop | None = None,
    log: Log | None = None,
    last: Path | None = None,
    boundary: int = 1,
    held: dict[str, Any] | None = None,
) -> TrainState:
    """Train `state.model` in place from `state.step` to the end of `cfg.epochs`, or to a reason to stop; returns at once if it is done.

    `accelerator` keeps its own gradient accumulation at 1. `evaluate` sees the averaged weights after each epoch (`val_...` in the
    row), `better` decides on `best`, which keeps them, and on `cfg.patience`; `stop` may end training after any update and may change
    `state.extra`. `last` is the resumable checkpoint, only ever written between updates, and at multiples of `boundary`: the updates
    per rollout. `held`: other settings that must stay the same when training goes on. Raises NonFiniteError, CheckpointError, and after
    Ctrl-C or SIGTERM Interrupted.
    """
    if cfg.save_every % boundary or steps_per_epoch % boundary:
        wrong = f"fit.save_every={cfg.save_every} and the {steps_per_epoch} updates per epoch"
        raise ValueError(f"{wrong} must be multiples of the {boundary} updates per rollout")
    _hold_to_plan(state, {"seed": seed, "steps_per_epoch": steps_per_epoch} | dataclasses.asdict(cfg) | (held or {}), last)
    if state.done:
        return state
    run = _Fit(objective, cfg, steps_per_epoch, accelerator, seed, evaluate, better, best, stop, log)
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    if cfg.ema_decay:
        state.ema = {k: v.detach().to(accelerator.device, copy=True) for k, v in (state.ema or state.model.state_dict()).items()}
    try:
        with deferred_interrupts() as caught:
            stream = batches(state.step * cfg.grad_accum)
            while not state.done:
                run.advance(state, model, optimizer, stream)
                reopenable = state.done or state.step % boundary == 0
                interrupted = reopenable and run.mean({"caught": float(bool(caught))})["caught"] > 0  # by any process
                due = state.step % cfg.save_every == 0 or state.step % steps_per_epoch == 0
                if last and accelerator.is_main_process and (due or interrupted or state.done):
                    state.save(last)
                if interrupted:
                    raise Interrupted(last, state.step)
    finally:  # leave nothing on the model that would keep it from being prepared again
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        state.model.__dict__.pop("_is_accelerate_prepared", None)
        accelerator.free_memory()
    return state
