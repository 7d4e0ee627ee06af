"""Trains a tiny model in as many processes as it is started in, each on its share of the same batches; run by test_engine.py."""

import itertools
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from hierarchical_diffusion_rlhf_caption_refinement.training.engine import fit
from hierarchical_diffusion_rlhf_caption_refinement.training.state import TrainState, make_optimizer
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import FitConfig
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import generator


class Log:
    def __init__(self):
        self.rows = []

    def __call__(self, row):
        self.rows.append({k: v for k, v in row.items() if isinstance(v, float | int) and k != "seconds"})

    def update(self, row):
        self(row)


def main(out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank, count = accelerator.process_index, accelerator.num_processes
    cfg = FitConfig(epochs=6, lr=0.02, grad_accum=2, ema_decay=0.9, patience=1, max_grad_norm=0.5, save_every=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    state, log, best_writes = TrainState(model, make_optimizer(model, cfg)), Log(), []

    def batches(first):
        for i in itertools.count(first):
            x = torch.randn(8, 4, generator=generator(0, i))
            yield x[rank::count], x[rank::count].sum(1, keepdim=True)

    def objective(model, batch):
        error = model(batch[0]) - batch[1]
        return (error**2).mean(), {"bias": error.mean()}

    def evaluate(model):  # each process has its share of the examples; the epoch 2 is the worse one
        x, _ = next(batches(10**6))
        return {"loss": float(model(x).mean()) + 100.0 * (state.step > 3)}

    fit(
        state,
        batches,
        objective,
        cfg,
        steps_per_epoch=3,
        accelerator=accelerator,
        seed=0,
        evaluate=evaluate,
        better=("val_loss", "min"),
        best=lambda model, row: best_writes.append(row["step"]),
        log=log,
        last=out.with_suffix(".last"),
    )
    resumed = TrainState(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)), state.optimizer)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        assert resumed.restore(out.with_suffix(".last")) and resumed.done
        result = {
            "model": state.model.state_dict(),
            "ema": state.ema,
            "rows": log.rows,
            "stopped": state.stopped,
            "best_writes": best_writes,
        }
        torch.save(result | {"processes": count}, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
