from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import preference
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import FILES
from hierarchical_diffusion_rlhf_caption_refinement.training.rlhf import Trainer, train_rlhf
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run, start_accelerator, steps_per_epoch
from hierarchical_diffusion_rlhf_caption_refinement.utils import checkpoint
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Config, FitConfig, RLHFConfig


def test_an_epoch_is_whole_updates_and_whole_rollouts() -> None:
    assert steps_per_epoch(FitConfig(batch_size=10), 95) == 9
    assert steps_per_epoch(FitConfig(batch_size=10, epoch_size=30, grad_accum=2), 95) == 1
    assert steps_per_epoch(FitConfig(batch_size=100), 7) == 1
    assert steps_per_epoch(FitConfig(batch_size=10), 95, boundary=4) == 12


def test_every_run_of_a_process_has_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{Run.__module__}.usable_precision", lambda wanted, device: wanted)
    for wanted in ("no", "bf16", "no"):
        assert start_accelerator(replace(Config(), mixed_precision=wanted)).mixed_precision == wanted  # type: ignore[arg-type]


def test_batches_are_addressed_by_number(world: Any, run_of: Callable[..., Run]) -> None:
    batches = run_of(world.config).batches("base", FitConfig(batch_size=4), 10, lambda i, rows, part: (i, rows[part]))
    first = list(islice(batches(0), 5))
    assert [i for i, _ in first] == list(range(5)) and list(islice(batches(3), 2)) == first[3:]
    assert all(len(rows) == 4 for _, rows in first) and sorted(first[0][1] + first[1][1] + first[2][1][:2]) == list(range(10))


def test_a_state_starts_anew_unless_resumed(world: Any, run_of: Callable[..., Run]) -> None:
    run, model = run_of(world.config), torch.nn.Linear(2, 2)
    state = run.state("base", model, FitConfig(), {"note": 1})
    state.step = 7
    state.save(run.last("base"))
    assert run_of(world.config, resume=True).state("base", torch.nn.Linear(2, 2), FitConfig(), {"note": 0}).step == 7
    assert run_of(world.config).state("base", torch.nn.Linear(2, 2), FitConfig()).step == 0 and not run.last("base").exists()


@pytest.mark.parametrize("inner", [1, 2])
def test_a_killed_rlhf_run_resumes_to_the_same_weights(
    world: Any, run_of: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, inner: int
) -> None:
    fit = FitConfig(epochs=2, epoch_size=16, batch_size=4, lr=1e-3, save_every=2, decay="constant")
    settings = RLHFConfig(group=3, steps=3, inner_updates=inner, fit=fit)
    base = world.denoiser()

    def train(resume: bool) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], Any]:
        run = run_of(world.config, resume=resume, rlhf=settings)
        path = train_rlhf(run, world.eyes, base, preference(world.reward(base)), preference(world.reward()), world.corpora, world.words)
        assert path == run.config.models / FILES["rlhf"]
        facts = checkpoint.load(path, "rlhf")["facts"]
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.log.rows("rlhf")]
        return checkpoint.load(run.last("rlhf"), "training")["model"], rows, facts["row"]["step"]

    whole, rows, step = train(resume=False)
    assert [row["step"] for row in rows] == [0, 4, 8] and all("val_gold_utility" in row for row in rows)
    assert rows[0]["val_kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["val_kl"] > 1e-4
    assert {"alpha", "dense_share", "entropy", "kl_weight", "zero_spread"} <= set(rows[-1])
    assert any((whole[name] != value).any() for name, value in base.state_dict().items())

    roll = Trainer.roll

    def killed(self: Trainer, index: int) -> Any:
        if index * inner >= 6:
            raise RuntimeError("killed")
        return roll(self, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Trainer, "roll", killed)
        train(resume=False)
    again, resumed_rows, resumed_step = train(resume=True)
    assert resumed_step == step and all(torch.equal(again[name], value) for name, value in whole.items())
    assert resumed_rows == rows


def test_only_whole_rollouts_are_saved() -> None:
    with pytest.raises(ValueError, match="multiple"):
        RLHFConfig(inner_updates=3, fit=replace(FitConfig(), save_every=50))
