"""Seeds are a pure function of their key; threads follow the load."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement.utils import seeding
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import (
    generator,
    seed_global,
    seed_of,
    set_threads,
    usable_device,
    usable_precision,
)


def test_seed_is_the_same_in_every_process():
    code = f"from {seeding.__name__} import seed_of; print(seed_of(3, 'base', 17))"
    for hash_seed in ("1", "2"):
        out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True)
        assert int(out.stdout) == seed_of(3, "base", 17)


def test_seeds_differ_by_seed_and_key_and_fit_63_bits():
    seeds = [seed_of(s, k, i) for s in range(5) for k in ("a", "b") for i in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**60


def test_generator_replays():
    first, again, other = (torch.rand(4, generator=generator(0, "x", i)) for i in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_seed_is_the_one_of_the_key():
    seed_global(torch.device("cpu"), 0, "x", 1)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=generator(0, "x", 1)))


@pytest.mark.parametrize(("load", "expected"), [(0.0, 8), (2.6, 5), (7.9, 1), (30.0, 1)])
def test_threads_take_the_idle_cores(monkeypatch, load, expected):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(seeding, "busy_cores", lambda: load)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert set_threads(0) == expected
    assert set_threads(3) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert set_threads(0) == max(1, expected // 4)
    assert chosen == [expected, 3, max(1, expected // 4)]


def test_work_that_goes_on_is_seen():
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert seeding.busy_cores(1.0) > 0.5
    finally:
        spin.kill()
        spin.wait()


@pytest.mark.parametrize(("device", "machine", "asked"), [
    ("cpu", "x86_64", "avx512"), ("cpu", "AMD64", "avx512"), ("cpu", "aarch64", "onednn"), ("cpu", "arm64", "onednn"),
    ("cuda", "x86_64", "cuda"), ("cuda", "aarch64", "cuda"),
])  # fmt: skip
@pytest.mark.parametrize("native", [False, True])
def test_bf16_is_not_emulated(monkeypatch, device, machine, asked, native):
    def says(who):
        return native if who == asked else not native

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: says("cuda"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: says("avx512"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: says("onednn"))
    assert usable_precision("bf16", torch.device(device)) == ("bf16" if native else "no")
    assert usable_precision("no", torch.device(device)) == "no"


def test_every_process_takes_its_own_gpu(monkeypatch):
    assert usable_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert usable_device() == torch.device("cuda", 1)
