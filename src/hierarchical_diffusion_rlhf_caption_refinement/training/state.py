"""What training changes: weights, optimizer, the average of the weights, and the file that resumes them."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils import checkpoint
from ..utils.checkpoint import CheckpointError
from ..utils.config import FitConfig


@dataclass
class TrainState:
    """All that a resumed fit needs; `model` is the bare module, also while several processes train it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Updates made."""
    best: float | None = None
    best_step: int = 0
    ema: dict[str, Tensor] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """What the stage keeps across resumes: plain values and tensors."""
    totals: dict[str, list[float]] = field(default_factory=dict)
    """Sum and count of each training metric in the epoch under way."""
    seconds: float = 0.0
    plan: dict[str, Any] = field(default_factory=dict)
    """Settings that a resumed fit must share."""
    stopped: str = ""
    """Why training ended early."""
    done: bool = False

    def save(self, path: Path) -> None:
        """Raises CheckpointError."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save(path, "training", plain | states | {"threads": torch.get_num_threads()})

    def restore(self, path: Path) -> bool:
        """Continue from `path`, with the CPU threads used so far; False if there is no such file. Raises CheckpointError."""
        if not path.exists():
            return False
        saved = checkpoint.load(path, "training")
        apart = {name: saved[name] for name in ("model", "optimizer", "threads", "extra")}
        try:
            self.model.load_state_dict(apart["model"])
            self.optimizer.load_state_dict(apart["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: is of another model: {' '.join(str(error).split())[:200]}; remove it to start over") from None
        torch.set_num_threads(apart["threads"])
        self.extra.update(apart["extra"])  # in place: the stage's closures may hold it
        for name in saved.keys() - apart.keys():
            setattr(self, name, saved[name])
        return True


def make_optimizer(model: nn.Module, cfg: FitConfig) -> torch.optim.AdamW:
    """AdamW on what is trained; biases and norms (fewer than two dimensions) do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)


@torch.no_grad()
def update_average(ema: dict[str, Tensor], model: nn.Module, step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) weights after update `step`, d = min(decay, (1 + step) / (10 + step)); integer buffers are copied."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        ema[name].lerp_(value, weight) if value.is_floating_point() else ema[name].copy_(value)


@contextmanager
def averaged(model: nn.Module, ema: dict[str, Tensor] | None) -> Iterator[None]:
    """Inside the block the model has the averaged weights instead of its own."""
    if ema is None:
        yield
        return
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(ema)
    try:
        yield
    finally:
        model.load_state_dict(own)
