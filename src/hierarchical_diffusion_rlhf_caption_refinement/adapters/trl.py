"""TRL: recorded comparisons as its preference data with their images, and our reward model as its reward function."""

import shutil
from collections.abc import Callable, Sequence
from filecmp import cmp
from pathlib import Path
from typing import Any

from ..captioner import Captioner, Seen
from ..data.images import prepared
from ..data.preferences import OTHER, PROMPT, PreferenceError, read_comparisons, to_trl
from ..data.text import encode, pad
from ..models.reward import BOUND
from ..utils.config import ConfigError
from ..utils.files import parse_row, whole

METADATA = "metadata.jsonl"


def export_preferences(comparisons: Path, images: Path, folder: Path, prompt: str = PROMPT) -> int:
    """Write the decided comparisons as a Hugging Face imagefolder that `load_dataset("imagefolder", data_dir=folder)` and TRL's DPOTrainer
    read; their images are copied from `images`. Returns the number of pairs.

    Raises PreferenceError, and ConfigError where something would be overwritten that is not of an earlier export.
    """
    found = [c for c in read_comparisons(comparisons) if c.choice in OTHER]
    names = sorted({c.image for c in found})
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not (images / name).is_file():
            raise PreferenceError(f"{name}: no such image in {images}")
    refuse_others(names, images, folder)
    for name in names:
        with whole(folder / name) as partial:
            shutil.copyfile(images / name, partial)
    return to_trl(found, folder / METADATA, prompt)


def refuse_others(names: Sequence[str], images: Path, folder: Path) -> None:
    """Raises ConfigError where an export would overwrite what it did not write; its own metadata tells that the images are its own, too."""
    if folder.resolve() == images.resolve():
        raise ConfigError(f"{folder}: the images are there; name another folder, to which they are copied")
    metadata = folder / METADATA
    first = metadata.read_bytes().partition(b"\n")[0] if metadata.is_file() else b""
    if parse_row(first, "file_names", "prompt", "chosen", "rejected", "id"):
        return
    other = [folder / name for name in names if (folder / name).exists() and not cmp(images / name, folder / name, shallow=False)]
    if taken := [*([metadata] if first else []), *other]:
        raise ConfigError(f"{taken[0]}: is there already, and not of an export; move it away, or name another folder")


def preference_reward(captioner: Captioner, column: str = "image") -> Callable[..., list[float]]:
    """For `GRPOTrainer(reward_funcs=...)`: how much people would like each completion as a caption of the picture in that column.

    In [-4, 4], 0 is the base model's average; nothing said gets the least. Raises ValueError for a captioner without a reward model.
    """
    reward, device = captioner.reward, captioner.model.mask.device
    if reward is None:
        raise ValueError("this captioner has no reward model")

    def people_like_it(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        scores, seen = [], dict[tuple[Any, bytes], Seen]()
        for picture, completion in zip(columns[column], completions, strict=True):
            picture = prepared(picture[0] if isinstance(picture, list) else picture)
            key = picture.size, picture.tobytes()
            looked = seen[key] = seen.get(key) or captioner.look(picture)
            x0, length = (x.to(device) for x in pad(encode(captioner.eyes.tokenizer, [_text(completion)]), captioner.model.max_length))
            scores.append(float(reward.score(x0, length, looked.tokens, looked.joint)) if length.any() else -BOUND)
        return scores

    return people_like_it


def _text(completion: Any) -> str:
    """Of a text, or of messages whose last one is a text or ends in one."""
    content = completion if isinstance(completion, str) else completion[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]
