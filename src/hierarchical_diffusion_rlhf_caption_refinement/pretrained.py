"""A captioner as files: a run's checkpoints, and Hugging Face's layout, in a folder or on the hub.

The layout: config.json, model.safetensors, tokenizer.json and preprocessor_config.json, readable by transformers; a pretrained vision
backbone and a pretrained CLIP go along whole, in the folders `vision` and `alignment`. Nothing in it is pickled.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, no_type_check

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .data.text import PAD, UNKNOWN_WORD, words_and_owners
from .evaluation.card import measured, model_card
from .models.alignment import PretrainedClip
from .models.denoiser import DiffusionCaptionModel, Prediction
from .models.reward import RewardModel
from .models.saved import (
    FILES,
    Eyes,
    Kind,
    build_denoiser,
    captioner_kind,
    eyes_from,
    eyes_payload,
    load_denoiser,
    load_weights,
    reward_beside,
    reward_from,
    reward_payload,
    settings_from,
)
from .models.vision import PretrainedVision, quiet
from .utils.checkpoint import CheckpointError
from .utils.config import Config, ConfigError, VisionConfig, to_plain
from .utils.files import parse_row, write_json

MODEL_TYPE = "caprefine"
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
WRITTEN = (CONFIG, WEIGHTS, TOKENIZER, CARD, "tokenizer_config.json", "preprocessor_config.json", "vision", "alignment")
WANTED = ["*.json", "*.safetensors", "*.txt", "*.md"]
"""What is fetched from the hub: no file that could hold code."""


@dataclass(frozen=True)
class Parts:
    """All that a captioner consists of."""

    kind: Kind
    eyes: Eyes
    denoiser: DiffusionCaptionModel
    reward: RewardModel | None
    files: tuple[Path, ...]
    """What they were read from, the checkpoint or config.json first: equal files, equal captions."""

    def measured(self) -> dict[str, Any]:
        """What is known of their quality: from config.json, or from the summary of the run that made the checkpoint."""
        first, config = self.files[0], self.eyes.config
        if first.name == CONFIG:
            return json.loads(first.read_text(encoding="utf-8"))["measured"]
        folder, models = first.resolve().parent.parts, config.models.parts
        path = Path(*folder[: -len(models)]) / config.results / "training_summary.json"
        where_it_was_made = folder[-len(models) :] == models
        return measured(json.loads(path.read_text(encoding="utf-8"))) if where_it_was_made and path.exists() else {}


def load_parts(source: str | Path, kind: Kind | None = None) -> Parts:
    """From a checkpoint, a run's folder of checkpoints (its refined model unless `kind` says base), a folder that `save_parts` wrote, or
    the hub. Raises CheckpointError."""
    path = local(source)
    if (path / CONFIG).exists():
        return _from_folder(path, kind)
    if path.is_dir():
        kind = kind or "rlhf"
        path /= FILES[kind]
    eyes, denoiser = load_denoiser(path, kind := kind or captioner_kind(path))
    if not (beside := reward_beside(path, eyes, words_and_owners(eyes.tokenizer))):
        return Parts(kind, eyes, denoiser, None, (path,))
    file, reward = beside
    return Parts(kind, replace(eyes, alignment=reward.evidence.alignment), denoiser, reward, (path, file))


def local(source: str | Path) -> Path:
    """The path itself or, for what is no path but looks like a hub id, where its files are after they were fetched."""
    if Path(source).exists() or Path(source).suffix == ".pt" or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=WANTED))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: no such file or folder, and not to be had from the hub: {reason}") from None


def refuse_others(folder: Path) -> None:
    """Raises ConfigError where something would be overwritten that `save_parts` did not write: its config.json comes first and tells."""
    config = folder / CONFIG
    told = parse_row(config.read_bytes(), "model_type") if config.is_file() else None
    taken = [] if told and told["model_type"] == MODEL_TYPE else [folder / name for name in WRITTEN if os.path.lexists(folder / name)]
    if taken:
        raise ConfigError(f"{taken[0]}: is there already, and no captioner that was saved here; move it away, or name another folder")


def save_parts(folder: Path, parts: Parts) -> None:
    """Raises OSError or CheckpointError if the folder cannot be written, ConfigError if it holds files of these names of other hands."""
    if folder.is_file():
        raise ConfigError(f"{folder}: is a file, expected a folder")
    refuse_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    eyes, payload = parts.eyes, eyes_payload(parts.eyes)
    state = {"denoiser": parts.denoiser.state_dict(), "vision": payload["vision"], "alignment": payload["alignment"]}
    told: dict[str, Any] = {"model_type": MODEL_TYPE, "architectures": [CaptionRefiner.__name__], "kind": parts.kind, "reward": None}
    if parts.reward:
        saved = reward_payload(parts.reward)
        state["reward"], told["reward"] = saved["model"], saved["shape"]
    told |= {"banned": payload["banned"], "settings": to_plain(_portable(eyes.config)), "measured": parts.measured()}
    told["transformers_version"] = transformers.__version__
    write_json(folder / CONFIG, told, indent=2)
    flat = {f"{part}.{name}": tensor.contiguous() for part, tensors in state.items() for name, tensor in tensors.items()}
    try:
        save_file(flat, folder / WEIGHTS, {"format": "pt"})
    except SafetensorError as error:  # what it makes of any OSError
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be written: {error}") from None
    eyes.tokenizer.save(str(folder / TOKENIZER))
    special = {"pad_token": PAD, "unk_token": UNKNOWN_WORD}
    known = {name: token for name, token in special.items() if eyes.tokenizer.token_to_id(token) is not None}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **known}, indent=2)
    size = sum(p.numel() for p in parts.denoiser.parameters()), eyes.tokenizer.get_vocab_size()
    (folder / CARD).write_text(model_card(eyes.config, parts.kind, *size, told["measured"]), encoding="utf-8")
    with quiet():
        if isinstance(eyes.vision, PretrainedVision):
            eyes.vision.processor.save_pretrained(folder)
            eyes.vision.save_backbone(folder / "vision")
        else:
            write_json(folder / "preprocessor_config.json", _patches_processor(eyes.config.vision), indent=2)
        if isinstance(eyes.alignment, PretrainedClip):
            for part in (eyes.alignment.model, eyes.alignment.tokenizer, eyes.alignment.processor):
                part.save_pretrained(folder / "alignment")


def _from_folder(folder: Path, kind: str | None) -> Parts:
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if told.get("model_type") != MODEL_TYPE:
            raise CheckpointError(f"{folder / CONFIG}: the model is of type {told.get('model_type')}, expected {MODEL_TYPE}")
        if kind not in (None, told["kind"]):
            raise CheckpointError(f"{folder}: is a {told['kind']} captioner, expected {kind}")
        state, tokenizer = load_file(folder / WEIGHTS), (folder / TOKENIZER).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: damaged or cut short: {error}") from None

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}

    settings = to_plain(_placed(settings_from(told["settings"], folder / CONFIG), folder))
    payload = {"config": settings, "tokenizer": tokenizer, "banned": told["banned"]} | {p: part(p) for p in ("vision", "alignment")}
    eyes = eyes_from(payload, folder / CONFIG)
    denoiser, reward = build_denoiser(eyes), None
    load_weights(denoiser, part("denoiser"), folder / WEIGHTS)
    if told["reward"]:
        words = words_and_owners(Tokenizer.from_str(tokenizer))
        reward = reward_from(eyes, words, {"model": part("reward"), "shape": told["reward"]}, folder / WEIGHTS)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    return Parts(told["kind"], eyes, denoiser.eval(), reward, (folder / CONFIG, *files))


def _portable(config: Config) -> Config:
    """Settings without the places of the machine that trained; what was pretrained is in the folder itself."""
    place = config.data.path
    if place and config.data.source != "hub":
        place = os.path.basename(os.path.abspath(place)) or "data"  # "." and "/" have no name of their own
    data = replace(config.data, path=place, images="", ratings="", comparisons="")
    clip = "alignment" if config.alignment.pretrained else ""
    vision = config.vision if config.vision.backbone == "patches" else replace(config.vision, backbone="vision")
    base = replace(config.base, backbone="", lora_rank=0)
    return replace(config, start_from="", data=data, vision=vision, base=base, alignment=replace(config.alignment, pretrained=clip))


def _placed(config: Config, folder: Path) -> Config:
    """The same with the folders of what was pretrained."""
    vision, clip = config.vision, config.alignment.pretrained
    if vision.backbone != "patches":
        vision = replace(vision, backbone=str(folder / vision.backbone))
    return replace(config, vision=vision, alignment=replace(config.alignment, pretrained=str(folder / clip) if clip else ""))


def _patches_processor(vision: VisionConfig) -> dict[str, Any]:
    """What `to_pixels` does, in transformers' words."""
    size = {"height": vision.image_size, "width": vision.image_size}
    return {
        "image_processor_type": "ViTImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": size, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip


@no_type_check  # the __init__ that it inherits takes more than its signature says
class CaptionRefinerConfig(PreTrainedConfig):
    """config.json as transformers holds it."""

    model_type = MODEL_TYPE


class CaptionRefiner(PreTrainedModel):
    """The networks of a captioner for who wants tensors: `AutoModel.from_pretrained(folder)`, once this package is imported.

    Captions come from `Captioner`, which reads the same folder.
    """

    config_class = CaptionRefinerConfig

    def __init__(self, config: CaptionRefinerConfig, parts: Parts) -> None:
        super().__init__(config)
        self.parts, self.denoiser, self.reward = parts, parts.denoiser, parts.reward
        self.vision = parts.eyes.vision.networks if isinstance(parts.eyes.vision, PretrainedVision) else parts.eyes.vision
        self.alignment = parts.eyes.alignment

    def forward(self, input_ids: Tensor, step: Tensor, length: Tensor, image: Tensor) -> Prediction:
        """Logits (B, T, V) of every token given the image tokens (N, P, F) and the tokens revealed before its step (B, T)."""
        return self.denoiser(input_ids, step, length, image)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> "CaptionRefiner":
        folder = local(pretrained_model_name_or_path)
        return cls(config or CaptionRefinerConfig.from_pretrained(folder), load_parts(folder)).eval()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        save_parts(Path(save_directory), self.parts)


AutoConfig.register(MODEL_TYPE, CaptionRefinerConfig)
AutoModel.register(CaptionRefinerConfig, CaptionRefiner)
