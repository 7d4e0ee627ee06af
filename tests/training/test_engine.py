"""One loop for every stage: exact resumes, exact accumulation, exact processes, and no harm when something goes wrong."""

import copy
import gc
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from hierarchical_diffusion_rlhf_caption_refinement.training.engine import NonFiniteError, fit, lr_at
from hierarchical_diffusion_rlhf_caption_refinement.training.state import TrainState, averaged, make_optimizer, update_average
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import CheckpointError
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import FitConfig
from hierarchical_diffusion_rlhf_caption_refinement.utils.interrupt import Interrupted
from hierarchical_diffusion_rlhf_caption_refinement.utils.runlog import RunLog
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import generator

TARGET = torch.tensor([[1.0, -2.0, 0.5, 3.0]])


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """`fit` collects garbage when it ends, which takes a while in the heap of a test session."""
    gc.freeze()
    yield
    gc.unfreeze()


class Recorder(list):
    """A log that keeps the epochs' rows, and the updates' beside them."""

    def __init__(self):
        super().__init__()
        self.updates = []

    def __call__(self, row):
        self.append(row)

    def update(self, row):
        self.updates.append(row)


def make(cfg, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16) if dropout else nn.Identity(), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1)
    )
    return TrainState(model, make_optimizer(model, cfg))


def batches(first):
    for i in itertools.count(first):
        x = torch.randn(8, 4, generator=generator(0, "batch", i))
        yield x, x @ TARGET.T


def squared(model, batch):
    x, y = batch
    error = model(x) - y
    return (error**2).mean(), {"bias": error.mean()}


def held_out(model):
    x, y = next(batches(10**6))
    return {"loss": float(((model(x) - y) ** 2).mean())}


def run(state, cfg, objective=squared, stream=batches, **options):
    options = {"steps_per_epoch": 10, "accelerator": Accelerator(cpu=True), "seed": 0} | options
    return fit(state, stream, objective, cfg, **options)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_lr_table():
    cfg = FitConfig(lr=0.1, warmup=0.2)
    assert [round(lr_at(s, 10, cfg), 4) for s in (0, 1, 2, 6, 10)] == [0.05, 0.1, 0.1, 0.05, 0.0]
    flat = FitConfig(lr=0.1, warmup=0.0, decay="constant")
    assert [lr_at(s, 10, flat) for s in (0, 5, 10)] == [0.1, 0.1, 0.1]


def test_only_trained_matrices_decay():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    matrices, vectors = make_optimizer(model, FitConfig(weight_decay=0.3)).param_groups
    assert [tuple(p.shape) for p in matrices["params"]] == [(3, 4)] and matrices["weight_decay"] == 0.3
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,), (3,), (3,)] and vectors["weight_decay"] == 0.0


def test_learns_and_logs(tmp_path):
    cfg, log = FitConfig(epochs=8, lr=0.03, ema_decay=0.9), Recorder()
    state = run(make(cfg), cfg, evaluate=held_out, better=("val_loss", "min"), log=log, last=tmp_path / "last.pt")
    assert log[-1]["val_loss"] < 0.2 * log[0]["val_loss"]
    assert [(r["epoch"], r["step"]) for r in log] == [(e, 10 * e) for e in range(1, 9)]
    assert list(log[0]) == ["step", "epoch", "lr", "loss", "bias", "grad_norm", "seconds", "val_loss"]
    for i, row in enumerate(log):
        assert row["loss"] == pytest.approx(sum(u["loss"] for u in log.updates[10 * i : 10 * i + 10]) / 10)
    assert [u["step"] for u in log.updates] == list(range(1, 81))
    assert state.done and not state.stopped and state.best == min(r["val_loss"] for r in log)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 10, 17, 29])
@pytest.mark.parametrize(("grad_accum", "dropout", "ema"), [(1, 0.0, 0.0), (2, 0.0, 0.0), (1, 0.3, 0.9), (2, 0.3, 0.9)])
def test_resume_is_bitwise(tmp_path, at, grad_accum, dropout, ema):
    cfg = FitConfig(epochs=3, lr=0.02, grad_accum=grad_accum, ema_decay=ema, save_every=4)
    options = {"evaluate": held_out, "better": ("val_loss", "min")}

    def counting(state, row):
        state.extra["kl"] = 0.9 * state.extra.get("kl", 1.0) + 0.1 * row["loss"]  # a running value, as a KL controller keeps

    whole, rows, kept = make(cfg, dropout), Recorder(), {}
    run(whole, cfg, log=rows, stop=counting, best=lambda model, row: kept.update(whole=copy.deepcopy(model)), **options)

    def kill(state, row):
        counting(state, row)
        if row["step"] == at:
            raise Killed

    killed, before = make(cfg, dropout), Recorder()
    with pytest.raises(Killed):
        run(
            killed,
            cfg,
            log=before,
            stop=kill,
            last=tmp_path / "last.pt",
            best=lambda model, row: kept.update(resumed=copy.deepcopy(model)),
            **options,
        )

    resumed, after = make(cfg, dropout, seed=1), Recorder()
    assert resumed.restore(tmp_path / "last.pt") == (at > 4)
    if at < 4:
        return
    assert resumed.step == max(s for s in (4, 8, 10, 12, 16, 20, 24, 28) if s < at)
    began = resumed.step
    run(
        resumed,
        cfg,
        log=after,
        stop=counting,
        last=tmp_path / "last.pt",
        best=lambda model, row: kept.update(resumed=copy.deepcopy(model)),
        **options,
    )
    assert same(resumed.model, whole.model)
    assert resumed.extra == whole.extra and (resumed.best, resumed.best_step) == (whole.best, whole.best_step)
    assert same(kept["resumed"], kept["whole"])
    assert timeless([r for r in before if r["step"] <= began] + after) == timeless(rows)
    torch.testing.assert_close(resumed.optimizer.state_dict(), whole.optimizer.state_dict(), rtol=0, atol=0)


def test_dropout_differs_between_micro_batches_and_replays(tmp_path):
    def masks(seed):
        seen, cfg = [], FitConfig(epochs=1, grad_accum=2)

        def objective(model, batch):
            seen.append(tuple(torch.rand(4).tolist()))
            return squared(model, batch)

        run(make(cfg), cfg, objective, steps_per_epoch=3, seed=seed)
        return seen

    assert masks(0) == masks(0) != masks(1)
    assert len(set(masks(0))) == 6


def test_rollouts_of_the_live_model_resume_at_their_boundary(tmp_path):
    cfg = FitConfig(epochs=2, lr=0.05, save_every=3, decay="constant")

    def rollouts(state):
        def stream(first):
            for i in itertools.count(first // 3):
                with torch.no_grad():
                    x, y = next(batches(i))
                    batch = x, state.model(x) + 0.1 * (y - state.model(x))
                yield from [batch] * 3

        return stream

    options = {"steps_per_epoch": 6, "boundary": 3, "last": tmp_path / "last.pt"}
    whole = make(cfg)
    run(whole, cfg, stream=rollouts(whole), steps_per_epoch=6, boundary=3)

    def interrupt(state, row):
        if row["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = make(cfg)
    with pytest.raises(Interrupted) as caught:
        run(stopped, cfg, stream=rollouts(stopped), stop=interrupt, **options)
    assert caught.value.step == 9
    resumed = make(cfg, seed=1)
    assert resumed.restore(tmp_path / "last.pt") and resumed.step == 9
    run(resumed, cfg, stream=rollouts(resumed), **options)
    assert same(resumed.model, whole.model)
    with pytest.raises(ValueError, match=r"save_every=3 and the 10 updates per epoch must be multiples of the 3 updates per rollout"):
        run(make(cfg), cfg, steps_per_epoch=10, boundary=3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_between_updates_and_the_resumed_run_leaves_the_same_rows(tmp_path, number):
    cfg, last = FitConfig(epochs=3, lr=0.02), tmp_path / "last.pt"
    logs = RunLog(tmp_path / "whole"), RunLog(tmp_path / "resumed")
    with logs[0].stage("base", 30) as log:
        whole = run(make(cfg), cfg, log=log)

    def objective(model, batch):  # the signal comes in the middle of update 17
        if state.step == 16:
            os.kill(os.getpid(), number)
        return squared(model, batch)

    state = make(cfg)
    with pytest.raises(Interrupted) as caught, logs[1].stage("base", 30) as log:
        run(state, cfg, objective, last=last, log=log)
    assert (caught.value.path, caught.value.step) == (last, 17)
    resumed = make(cfg, seed=1)
    assert resumed.restore(last) and resumed.step == 17 and not resumed.done
    with logs[1].stage("base", 30, resumed.step) as log:
        run(resumed, cfg, last=last, log=log)
    assert same(resumed.model, whole.model)
    assert timeless(logs[1].rows("base")) == timeless(logs[0].rows("base")) != []


def test_ctrl_c_in_the_last_evaluation_is_not_lost(tmp_path):
    cfg = FitConfig(epochs=1)

    def evaluate(model):
        os.kill(os.getpid(), signal.SIGINT)
        return held_out(model)

    with pytest.raises(Interrupted):
        run(make(cfg), cfg, evaluate=evaluate, last=tmp_path / "last.pt")
    finished = make(cfg)
    assert finished.restore(tmp_path / "last.pt") and finished.done


def test_a_finished_state_returns_at_once(tmp_path):
    cfg = FitConfig(epochs=1)
    run(make(cfg), cfg, last=tmp_path / "last.pt")
    state = make(cfg, seed=1)
    state.restore(tmp_path / "last.pt")

    def never(*args):
        pytest.fail("trained on")

    assert run(state, cfg, never, never, evaluate=never, log=Recorder()) is state and state.step == 10


def test_other_settings_or_another_model_do_not_resume(tmp_path):
    cfg, last = FitConfig(epochs=1), tmp_path / "last.pt"
    run(make(cfg), cfg, last=last)
    state = make(cfg)
    state.restore(last)
    with pytest.raises(CheckpointError, match=r"last\.pt: was trained with epochs=1, now it is 2; remove it to start over"):
        run(state, FitConfig(epochs=2), last=last)
    model = nn.Linear(4, 1)
    with pytest.raises(CheckpointError, match=r"last\.pt: is of another model: .*Unexpected key.*; remove it to start over") as caught:
        TrainState(model, make_optimizer(model, cfg)).restore(last)
    assert "\n" not in str(caught.value)
    assert not make(cfg).restore(tmp_path / "none.pt")


def test_a_resumed_run_keeps_its_threads(tmp_path):
    cfg, now = FitConfig(epochs=1), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        make(cfg).save(tmp_path / "last.pt")
        torch.set_num_threads(1)
        make(cfg).restore(tmp_path / "last.pt")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(now)


def test_accumulation_equals_the_big_batch():
    def halves(first):
        for x, y in batches(first // 2):
            yield x[:4], y[:4]
            yield x[4:], y[4:]

    one, two = (FitConfig(epochs=2, lr=0.02, grad_accum=n, ema_decay=0.9) for n in (1, 2))
    logs = Recorder(), Recorder()
    big = run(make(one), one, log=logs[0])
    accumulated = run(make(two), two, stream=halves, log=logs[1])
    torch.testing.assert_close(accumulated.model.state_dict(), big.model.state_dict(), rtol=1e-5, atol=1e-6)
    for a, b in zip(logs[0].updates, logs[1].updates, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_early_stop_keeps_the_best(tmp_path):
    values, cfg, kept, log = iter([3.0, math.nan, 2.0, 2.5, 2.0, 9.0, 9.0]), FitConfig(epochs=9, patience=2), [], Recorder()
    state = run(
        make(cfg),
        cfg,
        steps_per_epoch=2,
        evaluate=lambda model: {"loss": next(values)},
        better=("val_loss", "min"),
        best=lambda model, row: kept.append((row["epoch"], row["val_loss"])),
        log=log,
        last=tmp_path / "last.pt",
    )
    assert kept == [(1, 3.0), (3, 2.0)]
    assert (state.best, state.best_step, state.step) == (2.0, 6, 10)
    assert state.stopped == log[-1]["stopped"] == "no better val_loss in 2 epochs"
    resumed = make(cfg)
    assert resumed.restore(tmp_path / "last.pt") and resumed.done


def test_stage_may_stop_after_any_update_and_larger_may_be_better():
    cfg, log, kept = FitConfig(epochs=3), Recorder(), []
    state = run(
        make(cfg),
        cfg,
        evaluate=lambda model: {"reward": 1.0 + len(log)},
        better=("val_reward", "max"),
        best=lambda model, row: kept.append(row["step"]),
        stop=lambda state, row: "KL too high" if row["step"] == 13 else None,
        log=log,
    )
    assert (state.step, state.stopped, state.done) == (13, "KL too high", True)
    assert kept == [10, 13] == [row["step"] for row in log] and log[-1]["stopped"] == "KL too high"
    assert log[-1]["loss"] == pytest.approx(sum(u["loss"] for u in log.updates[10:]) / 3)


def test_unknown_metric_is_named():
    cfg = FitConfig(epochs=1)
    with pytest.raises(ValueError, match="no metric val_cider to choose the best weights by; there are step, epoch, lr, loss"):
        run(make(cfg), cfg, evaluate=held_out, better=("val_cider", "max"))


def test_average_formula():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    expected = ema["0.weight"].item()
    for step in range(1, 60):
        with torch.no_grad():
            model[0].weight.fill_(math.sin(step))
            model[1].num_batches_tracked.fill_(step)
        update_average(ema, model, step, 0.7)
        d = min(0.7, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * math.sin(step)
        assert ema["0.weight"].item() == pytest.approx(expected, abs=1e-6)
        assert ema["1.num_batches_tracked"] == step


def test_average_is_evaluated_and_kept_but_not_trained():
    cfg, seen = FitConfig(epochs=2, lr=0.05, ema_decay=0.95), []
    plain = FitConfig(epochs=2, lr=0.05)
    state = make(cfg)

    def evaluate(model):
        assert model is state.model and not model.training and not torch.is_grad_enabled()
        seen.append(copy.deepcopy(model.state_dict()))
        return held_out(model)

    kept = []
    run(state, cfg, evaluate=evaluate, better=("val_loss", "min"), best=lambda model, row: kept.append(copy.deepcopy(model.state_dict())))
    torch.testing.assert_close(seen[-1], dict(state.ema), rtol=0, atol=0)
    torch.testing.assert_close(kept[-1], seen[-1], rtol=0, atol=0)
    assert not torch.equal(seen[-1]["0.weight"], state.model[0].weight)
    assert same(state.model, run(make(plain), plain).model)
    with pytest.raises(Killed), averaged(state.model, state.ema):
        own = state.model[0].weight.clone()
        raise Killed
    assert torch.equal(own, state.ema["0.weight"]) and not torch.equal(own, state.model[0].weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_stops_with_good_weights(tmp_path, bad):
    cfg, last = FitConfig(epochs=1, save_every=2), tmp_path / "last.pt"

    def objective(model, batch):
        loss, metrics = squared(model, batch)
        return (loss * bad if state.step == 5 else loss), metrics

    state = make(cfg)
    with pytest.raises(NonFiniteError, match=rf"^update 6: the gradient is not finite \(loss {bad}\); a lower fit\.lr may help$"):
        run(state, cfg, objective, last=last)
    assert state.step == 5 and all(p.isfinite().all() for p in state.model.parameters())
    resumed = make(cfg)
    assert resumed.restore(last) and resumed.step == 4


def test_mixed_precision_leaves_the_model_as_it_was():
    cfg, kinds = FitConfig(epochs=10, lr=0.02), set()
    state = make(cfg)
    state.model[2].register_forward_hook(lambda module, inputs, output: kinds.add(inputs[0].dtype))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator, log = Accelerator(cpu=True, mixed_precision="bf16"), Recorder()
        run(state, cfg, accelerator=accelerator, log=log)
        assert kinds == {torch.bfloat16} and state.model[0].weight.dtype == torch.float32
        assert log[-1]["loss"] < 0.5 * log[0]["loss"]
        assert state.model(torch.ones(1, 4)).dtype == torch.float32 and kinds == {torch.bfloat16, torch.float32}
        kinds.clear()
        run(TrainState(state.model, make_optimizer(state.model, cfg)), cfg, accelerator=accelerator)
        assert kinds == {torch.bfloat16}
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    script = Path(__file__).with_name("ddp_engine_script.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path / "two.pt")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    two = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=120)
    assert two.returncode == 0, two.stderr
    one = subprocess.run([sys.executable, str(script), str(tmp_path / "one.pt")], env=env, capture_output=True, text=True, timeout=120)
    assert one.returncode == 0, one.stderr
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert (a["processes"], b["processes"]) == (1, 2)
    for part in ("model", "ema"):
        torch.testing.assert_close(a[part], b[part], rtol=1e-5, atol=1e-5)
    assert a["stopped"] == b["stopped"] == "no better val_loss in 1 epochs" and a["best_writes"] == b["best_writes"] == [3]
    for x, y in zip(a["rows"], b["rows"], strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-5)
