"""What makes a run repeatable: seeds that are a function of the run's seed and of what they are used for, CPU threads and precision."""

import hashlib
import os
import platform

import psutil
import torch


def seed_of(seed: int, *key: object) -> int:
    """63-bit hash of the seed and a key (its repr), the same in every process and on every machine."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *key: object) -> torch.Generator:
    """CPU generator for one purpose, e.g. `generator(config.seed, "rollout", step)`."""
    return torch.Generator().manual_seed(seed_of(seed, *key))


def seed_global(device: torch.device, seed: int, *key: object) -> None:
    """Seed the global generators of the CPU and of `device` for one purpose; `torch.manual_seed` is slow: it visits every backend."""
    torch.default_generator.manual_seed(seed_of(seed, *key))
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed_of(seed, *key))


def busy_cores(window_s: float = 0.5) -> float:
    """Cores' worth of work going on now; the load average would still count what ended a minute ago, an installation say."""
    return psutil.cpu_percent(window_s) / 100 * (psutil.cpu_count() or 1)


def set_threads(threads: int) -> int:
    """Set and return torch's CPU threads; 0 takes the cores that are idle now, shared among the processes that torchrun started here.

    One thread more than there are idle cores makes training several times slower: OpenMP threads spin while they wait for it.
    """
    if threads <= 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, (cores - round(busy_cores())) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def usable_device() -> torch.device:
    """This process's GPU, else the processor."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def usable_precision(wanted: str, device: torch.device) -> str:
    """`wanted`, unless that is bf16 on a device that only emulates it: many times slower on a processor."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif platform.machine() in ("x86_64", "AMD64"):  # where oneDNN claims to have bf16 with AVX-512 alone, and is four times slower
        native = torch.cpu._is_avx512_bf16_supported()
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "no" if wanted == "bf16" and not native else wanted
