"""METEOR and SPICE by pycocoevalcap, which runs Java: what is there is computed, what is not is left out."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Tokens = Sequence[str]


def java_scores(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """METEOR if Java and pycocoevalcap (the extra `eval`) are installed; SPICE if its Stanford models are, too (they are a download)."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if shutil.which("java") is None or spec is None or not spec.submodule_search_locations:
        return {}
    said = {i: [" ".join(caption) or "."] for i, caption in enumerate(candidates)}
    wanted = {i: [" ".join(ref) for ref in refs] for i, refs in enumerate(references)}
    found = {"meteor": _meteor(wanted, said)}
    if list((Path(spec.submodule_search_locations[0]) / "spice/lib").glob("stanford-corenlp-*-models.jar")):
        from pycocoevalcap.spice.spice import Spice

        found["spice"] = float(Spice().compute_score(wanted, said)[0])
    return found


def _meteor(wanted: dict[int, list[str]], said: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor: Any = Meteor()
    try:
        return float(meteor.compute_score(wanted, said)[0])
    finally:  # its process and pipes, which it would leave to the garbage collector
        process = meteor.meteor_p
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        process.kill()
        process.wait()
