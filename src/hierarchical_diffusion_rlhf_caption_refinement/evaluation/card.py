"""The model card of an exported captioner: what it is, how to use it, what was measured, and what it cannot do."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.config import Config, RLHFConfig

NAMES = {"data": "the training data's own", "base": "base model", "rlhf": "refined"}
MEASURED = ("gold", "references", "win_rate")


def measured(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a card tells of a run's `training_summary.json`."""
    found = {name: summary[name] for name in MEASURED if summary.get(name)}
    reward = {name: value for name, value in summary.get("reward", {}).items() if name in ("accuracy", "rater_agreement")}
    return found | ({"reward": reward} if reward else {})


def model_card(config: Config, kind: str, parameters: int, words: int, numbers: Mapping[str, Any]) -> str:
    """Markdown with the hub's front matter; `numbers` as `measured` gives them."""
    scenes = config.data.source == "scenes"
    made = "the built-in benchmark of rendered scenes" if scenes else f"`{config.data.path}`, a data set of the kind `{config.data.source}`"
    refined = f", refined {_how(config.rlhf, 'simulated raters' if scenes else 'people')}" if kind == "rlhf" else ""
    limit = (
        "It knows rendered scenes only: photographs are beyond it." if scenes else "It knows what its training images and captions show."
    )
    return f"""---
library_name: hierarchical-diffusion-rlhf-caption-refinement
pipeline_tag: image-to-text
tags: [image-captioning, masked-diffusion]
---

# {config.run}

A masked-diffusion image captioner of {parameters:,} parameters, trained on {made}{refined}.

```python
from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner

captioner = Captioner.from_pretrained("PATH_OR_HUB_ID")
caption = captioner("image.jpg")[0]
print(caption.text, caption.confidence, caption.reward)
```

## Measured

{_numbers(numbers, kind)}

## Limits

{limit} Captions have at most {config.data.max_words} tokens of a vocabulary of {words:,}.
Confidence and reward compare captions of this model, not of different ones.
"""


def _how(rlhf: RLHFConfig, judges: str) -> str:
    reward = f"the preferences of {judges}" if rlhf.sparse == "preference" else "agreement with the training captions (CIDEr-D)"
    how = f"on the best captions that a search finds by {reward}" if rlhf.method == "distil" else f"by reinforcement learning from {reward}"
    return f"{how}, after a first round as {Path(rlhf.first).name} says" if rlhf.first else how


def _numbers(numbers: Mapping[str, Any], kind: str) -> str:
    """The quality of each captioner on the test images, this one in bold."""
    table = numbers.get("gold") or numbers.get("references")
    if not table:
        return "Nothing: the run's `results/training_summary.json` was not there when this was exported."
    columns = list(next(iter(table.values())))
    rows = [["captions of the test images", *(c.replace("_", " ") for c in columns)], ["---"] * (len(columns) + 1)]
    for name, values in table.items():
        mark = "**" if name == kind else ""
        rows.append([f"{mark}{NAMES.get(name, name)}{mark}", *(f"{mark}{values[c]:.3f}{mark}" for c in columns)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if win := numbers.get("win_rate"):
        lines += ["", f"Refined beats base on {_share(win)} of the test images, ties half."]
    if accuracy := numbers.get("reward", {}).get("accuracy"):
        again = numbers["reward"].get("rater_agreement") or math.nan
        second = "" if math.isnan(again) else f", a second rater in {again:.1%}"
        lines += ["", f"The reward model makes the choice of a held-out rater in {_share(accuracy)} of the pairs{second}."]
    return "\n".join(lines)


def _share(row: Mapping[str, float]) -> str:
    return f"{row['value']:.1%} (95 %: {row['low']:.1%} to {row['high']:.1%})"
