"""Simulated raters for the built-in scenes: people with tastes of their own, who err, tie and refuse.

They look at the truth of two captions so that a model need not; only their choices and reasons leave this file.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Literal

from ..utils.seeding import seed_of
from .scenes import Quality, Scene, check

Verdict = Literal["a", "b", "tie", "both_bad"]
Reason = Literal["accuracy", "specificity", "fluency"]
REASONS: tuple[Reason, ...] = ("accuracy", "specificity", "fluency")

NOISE, TIE, BAD, LAPSE = 0.12, 0.065, 0.12, 0.16
"""Standard deviation of one look at one caption; smallest difference that a rater sees; liking below which a caption is bad: all in
units of utility. Share of the pairs on which a rater's mind is elsewhere and a coin decides. Together they make two raters agree as
often as people do."""


@dataclass(frozen=True)
class Choice:
    choice: Verdict
    reasons: tuple[Reason, ...] = ()
    """What spoke for the winner most; none for a tie or a lapse."""


@dataclass(frozen=True)
class Annotator:
    name: str
    taste: dict[Reason, float] = field(default_factory=lambda: dict.fromkeys(REASONS, 1.0))
    """Exponents of the three qualities; all 1 is the hidden utility itself."""
    noise: float = NOISE
    tie: float = TIE
    lapse: float = LAPSE
    length_bias: float = 0.0
    """Liking added per word, in utility: a fault that a reward model may learn."""

    def compare(self, scene: Scene, caption_a: str, caption_b: str, rng: random.Random) -> Choice:
        """Which of two captions this rater prefers on one look; noise and lapses come from `rng`."""
        if rng.random() < self.lapse:
            return Choice(rng.choice(("a", "b")))
        parts_a, parts_b = self._parts(check(caption_a, scene)), self._parts(check(caption_b, scene))
        liking_a = self._look(parts_a, caption_a, rng)
        liking_b = self._look(parts_b, caption_b, rng)
        if max(liking_a, liking_b) < BAD:
            return Choice("both_bad", _reasons({r: -parts_a[r] - parts_b[r] for r in REASONS}))
        if caption_a == caption_b or abs(liking_a - liking_b) < self.tie:
            return Choice("tie")
        won, lost = (parts_a, parts_b) if liking_a > liking_b else (parts_b, parts_a)
        return Choice("a" if liking_a > liking_b else "b", _reasons({r: won[r] - lost[r] for r in REASONS}))

    def _parts(self, quality: Quality) -> dict[Reason, float]:
        """Logarithms of the factors of the liking; a factor of 0 counts as 0.01."""
        factors: dict[Reason, float] = {
            "accuracy": quality.accuracy,
            "specificity": 0.4 + 0.6 * math.sqrt(quality.specificity),
            "fluency": quality.fluency,
        }
        return {r: self.taste[r] * math.log(max(f, 0.01)) for r, f in factors.items()}

    def _look(self, parts: dict[Reason, float], caption: str, rng: random.Random) -> float:
        return math.exp(sum(parts.values())) + self.length_bias * len(caption.split()) + rng.gauss(0, self.noise)


def _reasons(gains: dict[Reason, float]) -> tuple[Reason, ...]:
    """The qualities that make up at least 30 % of all that spoke for the choice, the weightiest first."""
    total = sum(max(g, 0.0) for g in gains.values())
    return tuple(sorted((r for r in REASONS if total > 0 and gains[r] >= 0.3 * total), key=lambda r: -gains[r]))


def panel(seed: int, n: int = 8, length_bias: float = 0.0) -> list[Annotator]:
    """Raters whose tastes, care and indecision scatter around the hidden utility's; `length_bias` is the panel's mean."""
    people = []
    for i in range(n):
        rng = random.Random(seed_of(seed, "annotator", i))
        people.append(
            Annotator(
                name=f"rater-{i}",
                taste={r: math.exp(rng.gauss(0, 0.35)) for r in REASONS},
                noise=NOISE * math.exp(rng.gauss(0, 0.25)),
                tie=TIE * math.exp(rng.gauss(0, 0.3)),
                lapse=LAPSE * math.exp(rng.gauss(0, 0.25)),
                length_bias=length_bias * math.exp(rng.gauss(0, 0.25)),
            )
        )
    return people
