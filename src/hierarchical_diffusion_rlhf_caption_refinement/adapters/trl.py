"""TRL: recorded comparisons as its preference data with their images, and our reward model as its reward function."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..captioner import Captioner, Seen
from ..data.images import prepared
from ..data.preferences import OTHER, PROMPT, PreferenceError, read_comparisons, to_trl
from ..data.text import encode, pad
from ..models.reward import BOUND


def export_preferences(comparisons: Path, images: Path, folder: Path, prompt: str = PROMPT) -> int:
    """Write the decided comparisons as a Hugging Face imagefolder that `load_dataset("imagefolder", data_dir=folder)` and TRL's DPOTrainer
    read; their images are copied from `images`. Returns the number of pairs. Raises PreferenceError.
    """
    found = [c for c in read_comparisons(comparisons) if c.choice in OTHER]
    for name in {c.image for c in found}:
        if Path(name).is_absolute() or ".." in Path(name).parts or not (images / name).is_file():
            raise PreferenceError(f"{name}: no such image in {images}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / name, folder / name)
    return to_trl(found, folder / "metadata.jsonl", prompt)


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
