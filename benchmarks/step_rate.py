"""How fast the three stages train at full size: samples per second, memory, share of the device's bf16 rate.

GPT-2 small and CLIP ViT-B/32 with untrained weights, which cost what trained ones do, are made on the spot; images and captions are the
scenes'. Floating-point operations are counted by PyTorch in one update of each stage, rollout included; the device's own rate is that of a
large matrix product in the same call.

    python benchmarks/step_rate.py --config configs/conceptual_captions.yaml --output step_rate.json
    python benchmarks/step_rate.py --config configs/conceptual_captions.yaml --times 1 8 --output step_rate.json
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import sample_scene, write_caption
from hierarchical_diffusion_rlhf_caption_refinement.training.pipeline import Pipeline
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run, start_accelerator
from hierarchical_diffusion_rlhf_caption_refinement.utils.command import at_least, find_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.files import write_json
from hierarchical_diffusion_rlhf_caption_refinement.utils.runlog import Row, RunLog, StageLog
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import set_threads

WARM = 5
"""Updates of a stage before the first that is timed; the time of the very first is not taken."""
STAGES = ("base", "reward", "rlhf")
TOLD = ("mean_words",)
"""What the record keeps of the last update's own metrics."""
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES: dict[str, dict[str, Any]] = {
    "full": {"gpt2": {}, "clip": {}, "words": 60000},  # transformers' defaults: GPT-2 small, ViT-B/32
    "tiny": {
        "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 600},
        "clip": {"text_config": TINY | {"vocab_size": 600}, "vision_config": TINY | {"image_size": 32, "patch_size": 8}},
        "words": 300,
    },
}


def some_words(count: int) -> list[str]:
    """Distinct words of two to four syllables: a vocabulary of any size is then one of words."""
    rng, found = random.Random(0), dict[str, None]()
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    while len(found) < count:
        found[" " + "".join(rng.choices(syllables, k=rng.choice((2, 3, 4))))] = None
    return list(found)


def save_tokenizer(folder: Path, texts: list[str], size: int, special: list[str]) -> Tokenizer:
    """Byte pairs of the texts, up to `size` of them with the special tokens, which come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - len(special), initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    if len(special) == 2:
        ends = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A {special[1]}", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1], pad_token=special[-1]).save_pretrained(folder)
    return tokenizer


def save_models(folder: Path, size: dict[str, Any]) -> None:
    """`gpt2` and `clip` in the hub's layout."""
    rng = random.Random(0)
    texts = [write_caption(sample_scene(0, "train", i), rng) for i in range(500)] + some_words(size["words"])
    gpt2, clip = GPT2Config(**size["gpt2"]), CLIPConfig(**size["clip"])
    save_tokenizer(folder / "gpt2", texts, gpt2.vocab_size, ["<|endoftext|>"])
    GPT2Model(gpt2).save_pretrained(folder / "gpt2")
    text: Any = clip.text_config
    tokenizer = save_tokenizer(folder / "clip", texts, text.vocab_size, ["<|startoftext|>", "<|endoftext|>"])
    text.bos_token_id, text.eos_token_id = tokenizer.get_vocab_size() - 2, tokenizer.get_vocab_size() - 1
    CLIPModel(clip).save_pretrained(folder / "clip")
    side = clip.vision_config.image_size
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder / "clip")


def settled(device: torch.device) -> float:
    """The time, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Stopwatch:
    """Takes the time between updates, and counts the operations of the last one, whose time it leaves out."""

    log: StageLog
    device: torch.device
    last: int
    seconds: list[float] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    counter: FlopCounterMode = field(default_factory=lambda: FlopCounterMode(display=False))
    facts: Row = field(default_factory=dict)

    def __call__(self, row: Row) -> None:
        self.log(row)

    def update(self, row: Row) -> None:
        now = settled(self.device)
        if row["step"] == self.last:
            self.counter.__exit__(None, None, None)
            self.facts.update({name: row[name] for name in TOLD if name in row})
        elif self.started:
            self.seconds.append(now - self.started[-1])
        if row["step"] == self.last - 1:
            self.counter.__enter__()
        self.started.append(settled(self.device))


class Meter(RunLog):
    """A run's log that measures each stage."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder)
        self.device = device
        self.found: dict[str, Row] = {}

    @contextmanager
    def stage(self, name: str, total: int, resume_step: int = 0, console: Console | None = None) -> Iterator[Any]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with super().stage(name, total, resume_step, console) as log:
            watch = Stopwatch(log, self.device, total)
            yield watch
        found: Row = {
            "seconds_per_update": statistics.median(watch.seconds[WARM - 1 :]),
            "flops_per_update": watch.counter.get_total_flops(),
        }
        if self.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.found[name] = found | watch.facts


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations per second of a large product of matrices."""
    n, kind = (8192 if device.type == "cuda" else 1024), torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = []
    for _ in range(10):
        started = settled(device)
        a @ b
        seconds.append(settled(device) - started)
    return 2 * n**3 / statistics.median(seconds)


def measured(config: Path, folder: Path, times: int, updates: int, overrides: list[str]) -> dict[str, Row]:
    """Each stage for some updates of `times` the configured batch."""
    plain = load_config([config], overrides)
    sizes = {stage: times * getattr(plain, stage).fit.batch_size for stage in STAGES}
    own = {
        "data.source": "scenes",
        "data.comparisons": "''",
        "data.ratings": "''",
        "rlhf.first": "''",
        "data.train": 1024,
        "data.val": 32,
        "data.test": 32,
        "reward.curve": [],
    }
    own |= {"base.backbone": folder / "gpt2", "vision.backbone": folder / "clip", "alignment.pretrained": folder / "clip"}
    own |= {
        "reward.comparisons": max(300, sizes["reward"]),
        "base.fit.lr": 1e-3,  # so that captions of a usual length are soon written
        "run": f"times{times}",
    }
    for stage, size in sizes.items():
        fit = {"batch_size": size, "epochs": 1, "epoch_size": updates * size, "save_every": updates, "patience": 0}
        own |= {f"{stage}.fit.{key}": value for key, value in fit.items()}
    chosen = load_config([config], [f"{key}={value}" for key, value in own.items()] + overrides)
    set_threads(chosen.threads)
    accelerator = start_accelerator(chosen)
    precision = accelerator.mixed_precision
    meter, peak = Meter(chosen.results, accelerator.device), matrix_rate(accelerator.device, precision)
    Pipeline(Run(chosen, accelerator, meter, False)).train(["alignment", *STAGES])
    for stage, row in meter.found.items():
        size = sizes[stage] * (chosen.rlhf.group if stage == "rlhf" else 1)
        rate = row["flops_per_update"] / row["seconds_per_update"]
        row |= {"samples_per_update": size, "samples_per_second": size / row["seconds_per_update"], "share_of_matrix_rate": rate / peak}
    return {"precision": precision, "matrix_rate": peak, "stages": meter.found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--times", type=int, nargs="+", default=[1], help="multiples of the configured batch")
    parser.add_argument("--updates", type=at_least(8), default=40, help="of each stage, 8 or more")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny: to see that it runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    config, output, found = find_config(args.config).resolve(), args.output.resolve(), {}
    with TemporaryDirectory() as folder, chdir(folder):
        save_models(Path(folder), SIZES[args.size])
        for times in args.times:
            found[str(times)] = measured(config, Path(folder), times, args.updates, args.overrides)
            write_json(output, {"device": device, "torch": torch.__version__, "size": args.size, "times": found})
    table = Table("batch", "stage", "samples", "samples/s", "ms", "TFLOP/update", "share of matrix rate", "GiB")
    for times, row in found.items():
        for stage, r in row["stages"].items():
            speed = f"{r['samples_per_second']:.0f}", f"{1e3 * r['seconds_per_update']:.0f}"
            work = f"{r['flops_per_update'] / 1e12:.3g}", f"{r['share_of_matrix_rate']:.1%}"
            memory = f"{r['memory_gib']:.1f}" if "memory_gib" in r else ""
            table.add_row(f"x{times}", stage, str(r["samples_per_update"]), *speed, *work, memory)
    Console().print(table)


if __name__ == "__main__":
    main()
