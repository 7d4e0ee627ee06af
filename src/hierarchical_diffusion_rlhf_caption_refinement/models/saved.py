"""Models as files: building them from a config, and the payloads of their checkpoints. A captioner's file holds all it needs to see."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import nn

from ..utils import checkpoint
from ..utils.checkpoint import CheckpointError
from ..utils.config import Config, ConfigError, Stage, config_from_plain, to_plain
from .alignment import Alignment, AlignmentModel, PretrainedClip
from .denoiser import DiffusionCaptionModel
from .gpt2 import add_lora, load_gpt2, merged_weights, start_from_gpt2
from .reward import Evidence, RewardModel, Words
from .vision import PatchEncoder, PretrainedVision, build_vision

Vision = PatchEncoder | PretrainedVision
Kind = Literal["base", "rlhf"]
"""Of a captioner."""
FILES: dict[Stage, str] = {
    "alignment": "alignment_model.pt",
    "base": "best_base_model.pt",
    "reward": "best_reward_model.pt",
    "rlhf": "best_rlhf_model.pt",
}


class OtherEyesError(CheckpointError):
    """A reward model that cannot judge the captioner beside it."""


@dataclass(frozen=True)
class Eyes:
    """The frozen part that sees: image encoder, tokenizer, and the alignment model on top of them."""

    config: Config
    tokenizer: Tokenizer
    banned: tuple[int, ...]
    """Ids that no caption may contain; the first closes captions with an open end."""
    vision: Vision
    alignment: Alignment

    def to(self, device: torch.device | str) -> "Eyes":
        """These eyes, their networks moved there."""
        self.vision.to(device)
        if isinstance(self.alignment, nn.Module):
            self.alignment.to(device)
        return self


def build_alignment(config: Config, tokenizer: Tokenizer, image_width: int) -> AlignmentModel | PretrainedClip:
    if config.alignment.pretrained:
        return PretrainedClip(config.alignment.pretrained)
    return AlignmentModel(tokenizer, config.data.max_words, image_width, config.alignment)


def build_denoiser(eyes: Eyes, dropout: float = 0.0) -> DiffusionCaptionModel:
    base, vision = eyes.config.base, eyes.vision
    if base.open_end and not eyes.banned:
        raise ConfigError("base.open_end: the tokenizer has no special token that could close a caption")
    return DiffusionCaptionModel(
        eyes.tokenizer.get_vocab_size(),
        eyes.config.data.max_words,
        vision.num_tokens,
        vision.width,
        width=base.width,
        layers=base.layers,
        heads=base.heads,
        dropout=dropout,
        banned=eyes.banned,
        end=eyes.banned[0] if base.open_end else None,
    )


def start_denoiser(eyes: Eyes) -> tuple[Eyes, DiffusionCaptionModel]:
    """A denoiser to train, new or from base.backbone, and the eyes whose config tells its shape: later ones need no backbone."""
    base = eyes.config.base
    if not base.backbone:
        return eyes, build_denoiser(eyes, base.dropout)
    gpt2 = load_gpt2(base.backbone)
    shape = gpt2.config
    base = replace(base, width=shape.n_embd, layers=shape.n_layer, heads=shape.n_head)
    eyes = replace(eyes, config=replace(eyes.config, base=base))
    model = build_denoiser(eyes, base.dropout)
    start_from_gpt2(model, gpt2)
    if base.lora_rank:
        add_lora(model, gpt2, base.lora_rank)
    return eyes, model


def eyes_payload(eyes: Eyes) -> dict[str, Any]:
    """What every checkpoint holds besides its own weights."""
    own = eyes.alignment.state_dict() if isinstance(eyes.alignment, AlignmentModel) else {}
    common = {"config": to_plain(eyes.config), "tokenizer": eyes.tokenizer.to_str(), "banned": list(eyes.banned)}
    return common | {"vision": dict(eyes.vision.state_dict()), "alignment": own}


def settings_from(tree: dict[str, Any], path: Path) -> Config:
    """Settings that a file holds. Raises CheckpointError."""
    shaping = {"fade": 0.0} | tree.get("shaping", {})  # files from before alpha could fade
    try:
        return config_from_plain(tree | {"shaping": shaping})
    except ConfigError as error:
        raise CheckpointError(f"{path}: made by another version of the package: {error}") from None


def above(path: Path, place: str) -> list[Path]:
    """Where a place may be that is relative to where training ran: above the file, unless this was moved away, else relative to here."""
    return [*(folder / place for folder in path.absolute().parents), Path(place)]


def _whereabouts(name: str, path: Path) -> str:
    """The folder of what is pretrained, for the file that names it; a hub id as it is. Raises CheckpointError."""
    if name in ("", "patches"):
        return name
    found = next((str(place) for place in above(path, name) if place.is_dir()), None)
    if not (found or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)):
        export = "`caprefine export`, run where the folder is, makes a captioner that can be moved"
        raise CheckpointError(f"{path}: {name}, by which it sees, is no folder from here, nor from a folder above that file; {export}")
    return found or name


def eyes_from(payload: dict[str, Any], path: Path) -> Eyes:
    """The eyes that `eyes_payload` describes; `path` is for the message of the CheckpointError."""
    config = settings_from(payload["config"], path)
    tokenizer = Tokenizer.from_str(payload["tokenizer"])
    vision = build_vision(replace(config.vision, backbone=_whereabouts(config.vision.backbone, path)))
    load_weights(vision, payload["vision"], path)
    clip = replace(config.alignment, pretrained=_whereabouts(config.alignment.pretrained, path))
    alignment = build_alignment(replace(config, alignment=clip), tokenizer, vision.width)
    if isinstance(alignment, AlignmentModel):
        load_weights(alignment, payload["alignment"], path)
    for part in (vision, alignment):
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return Eyes(config, tokenizer, tuple(payload["banned"]), vision, alignment)


def save_eyes(path: Path, eyes: Eyes, facts: dict[str, Any]) -> None:
    checkpoint.save(path, "alignment", eyes_payload(eyes) | {"facts": facts})


def load_eyes(path: Path) -> Eyes:
    return eyes_from(checkpoint.load(path, "alignment"), path)


def earlier(config: Config, stage: Stage) -> Path:
    """The checkpoint that a run builds on: of `start_from`, or its own if it has built it on the same start. Raises CheckpointError."""
    own, start = config.models / FILES[stage], Path(config.start_from)
    if not config.start_from:
        return own
    built_here = own.exists() and checkpoint.load(own, stage)["config"].get("start_from") == config.start_from
    return own if built_here else start / FILES[stage]


def captioner_kind(path: Path) -> Kind:
    """Which of the two captioners a checkpoint is. Raises CheckpointError."""
    kind = checkpoint.kind_of(path)
    if kind not in ("base", "rlhf"):
        raise CheckpointError(f"{path}: is a {kind} checkpoint, expected a captioner: base or rlhf")
    return kind


def save_denoiser(path: Path, kind: Kind, eyes: Eyes, model: nn.Module, facts: dict[str, Any]) -> None:
    checkpoint.save(path, kind, eyes_payload(eyes) | {"model": merged_weights(model), "facts": facts})


def load_denoiser(path: Path, kind: Kind) -> tuple[Eyes, DiffusionCaptionModel]:
    """Eyes, and the model in eval mode. Raises CheckpointError."""
    payload = checkpoint.load(path, kind)
    eyes = eyes_from(payload, path)
    model = build_denoiser(eyes)
    load_weights(model, payload["model"], path)
    return eyes, model.eval()


def reward_payload(reward: RewardModel) -> dict[str, Any]:
    """Weights and shape; the evidence's denoiser goes along, the alignment model is among the eyes."""
    state = {name: value for name, value in reward.state_dict().items() if not name.startswith("evidence.alignment.")}
    layers = len(reward.readers[0].blocks) if len(reward.readers) else 0  # type: ignore[arg-type, union-attr]
    shape = {"members": len(reward.linear), "reader_layers": layers, "pessimism": reward.pessimism, "weak": reward.weak}
    return {"model": state, "shape": shape}


def reward_from(eyes: Eyes, words: Words, payload: dict[str, Any], path: Path) -> RewardModel:
    """The frozen model that `reward_payload` describes; `path` is for the message of the CheckpointError."""
    shape = payload["shape"]
    reward = RewardModel(Evidence(build_denoiser(eyes), eyes.alignment, words, shape["reader_layers"] or 1), **shape)
    state = payload["model"]
    if isinstance(eyes.alignment, nn.Module):
        state |= {f"evidence.alignment.{name}": value for name, value in eyes.alignment.state_dict().items()}
    load_weights(reward, state, path)
    return reward.eval().requires_grad_(False)


def save_reward(path: Path, eyes: Eyes, reward: RewardModel, facts: dict[str, Any]) -> None:
    checkpoint.save(path, "reward", eyes_payload(eyes) | reward_payload(reward) | {"facts": facts})


def load_reward(path: Path, words: Words) -> tuple[Eyes, RewardModel]:
    """The frozen reward model, and the eyes that it was trained with. Raises CheckpointError."""
    payload = checkpoint.load(path, "reward")
    eyes = eyes_from(payload, path)
    return eyes, reward_from(eyes, words, payload, path)


def same_eyes(one: Eyes, other: Eyes) -> bool:
    """Whether they see alike and spell alike."""
    a, b = ((e.tokenizer.get_vocab(), e.vision.fingerprint(), e.config.alignment.pretrained, e.config.data.max_words) for e in (one, other))
    mine, theirs = (eyes_payload(eyes)["alignment"] for eyes in (one, other))
    return a == b and mine.keys() == theirs.keys() and all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in mine)


def reward_beside(captioner: Path, eyes: Eyes, words: Words) -> tuple[Path, RewardModel] | None:
    """The reward model beside a captioner, else the one that its run built on, and its file.

    Raises OtherEyesError if its eyes are not the captioner's: what it would make of its captions means nothing.
    """
    start = eyes.config.start_from
    folders = [captioner.parent, *(above(captioner, start) if start else [])]
    path = next((path for folder in folders if (path := folder / FILES["reward"]).exists()), None)
    if path is None:
        return None
    its, reward = load_reward(path, words)
    if not same_eyes(its, eyes):
        raise OtherEyesError(f"{path}: its eyes or its vocabulary are not those of {captioner}; train the older one anew, or move it away")
    return path, reward


def load_weights(model: nn.Module | PretrainedVision, state: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for weights of another shape, and for such as are no finite numbers: the captions would be padding."""
    if wrong := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{path}: damaged: not all numbers of {wrong[0]} are finite")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the model of its own config: {' '.join(str(error).split())[:160]}") from None


def with_config(eyes: Eyes, config: Config) -> Eyes:
    """The same eyes under another run's settings; what they were built from must stay."""
    kept = eyes.config
    data = replace(config.data, max_words=kept.data.max_words)
    return replace(eyes, config=replace(config, vision=kept.vision, alignment=kept.alignment, data=data))
