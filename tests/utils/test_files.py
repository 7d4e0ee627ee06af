"""Files that other programs read."""

import json
import math
from pathlib import Path

import numpy as np

from hierarchical_diffusion_rlhf_caption_refinement.utils.files import write_json


def test_json_that_every_parser_reads(tmp_path: Path) -> None:
    """A number that nobody knows is null: JSON has no word for nan."""
    content = {"agreement": math.nan, "many": [math.inf, 0.1, np.float64(0.5)], "text": "NaN"}
    write_json(tmp_path / "new" / "x.json", content)
    text = (tmp_path / "new" / "x.json").read_text()
    assert json.loads(text, parse_constant=lambda word: f"not JSON: {word}") == {"agreement": None, "many": [None, 0.1, 0.5], "text": "NaN"}
