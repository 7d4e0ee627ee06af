"""What `predict --refine` and the dials are worth, on test images of trained models.

    python benchmarks/repair.py scenes models --output docs/results/repair.json
    python benchmarks/repair.py photographs models/flickr8k --output docs/results/repair.json

`scenes`: correct captions of the data set and copies with one wrong word, repaired (all but the split is the fact checker's), and captions
chosen at several weights of specificity. `photographs`: captions of people, and copies with one noun swapped, ranked by suspicion and
repaired.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import check, swap_fact
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example, load_examples
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import build_corpus, gold_summary, interval_row
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import EVEN, Dials
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import seed_of

SETTINGS = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0)
"""Weights of specificity; on validation scenes the last gains nothing any more."""
SINGULAR = """
    dog man woman boy girl person child beach street field ball pool wall building bike rock park road tree car bench baby mountain hill
    lake river crowd jacket shirt hat skateboard bicycle table fence swing horse couple lady motorcycle toy frisbee ocean room rope guitar
    bird boat stick
"""
PLURAL = "dogs men women boys girls people children kids players trees rocks bikes horses adults mountains waves cars"
NOUNS = (SINGULAR.split(), PLURAL.split())
"""Frequent nouns of Flickr8k; one is swapped for another of its number."""


def auc(high: list[float], low: list[float]) -> float:
    a, b = np.array(high)[:, None], np.array(low)
    return float((a > b).mean() + (a == b).mean() / 2)


def swap_noun(caption: str, rng: random.Random) -> str | None:
    words = caption.split()
    places = [i for i, word in enumerate(words) if any(word.lower() in nouns for nouns in NOUNS)]
    if not places:
        return None
    at = rng.choice(places)
    nouns = next(nouns for nouns in NOUNS if words[at].lower() in nouns)
    words[at] = rng.choice([noun for noun in nouns if noun not in caption.lower().split()])
    return " ".join(words)


def one_wrong_word(examples: list[Example], most: int) -> list[tuple[Example, str, str]]:
    """Correct captions, one of each scene, with a copy in which one fact is false."""
    found = []
    for example in examples:
        assert example.scene is not None
        good = [t for t in example.captions if (q := check(t, example.scene)).accuracy == 1 and q.fluency == 1]
        pairs = ((t, swap_fact(t, example.scene, random.Random(seed_of(0, "swap", example.key)))) for t in good)
        found += [(example, text, swapped) for text, swapped in pairs if swapped][:1]
    return found[:most]


def repairs(captioner: Captioner, examples: list[Example], most: int, weak: float | None) -> dict:
    repaired, restored, damaged, changed, facts, doubt = [], [], [], [], [], ([], [])
    for example, text, swapped in one_wrong_word(examples, most):
        picture = example.image()
        good, bad = (captioner.refine(picture, caption, weak) for caption in (text, swapped))
        before, after, fixed = (check(caption, example.scene) for caption in (text, good.text, bad.text))
        repaired.append(fixed.accuracy == 1 and fixed.fluency == 1)
        restored.append(bad.text == text)
        damaged.append(after.accuracy < 1 or after.fluency < 1)
        changed.append(good.text != text)
        facts.append(after.specificity - before.specificity)
        doubt[0].append(bad.suspicion)
        doubt[1].append(good.suspicion)
    shares = {"repaired": repaired, "restored_word_by_word": restored, "correct_damaged": damaged, "correct_changed": changed}
    rows = {name: interval_row(np.array(values, float)) for name, values in shares.items()}
    return {"captions": len(repaired), **rows, "correct_specificity_gained": float(np.mean(facts)), "suspicion_auc": auc(*doubt)}


def dials(captioner: Captioner, examples: list[Example]) -> list[dict]:
    """The best of eight captions of each scene, at several weights of specificity."""
    rows, seen = [], [captioner.look(example.image()) for example in examples]
    plan = replace(captioner.plan, candidates=8, temperature=0.5)
    for weight in SETTINGS:
        captioner.dials = Dials(specificity=weight)
        parts = [captioner.write(seen[i : i + 50], plan, 0) for i in range(0, len(seen), 50)]
        rows.append({"weight": weight} | gold_summary([caption.text for part in parts for caption in part], examples))  # type: ignore[union-attr]
        print(json.dumps(rows[-1]), flush=True)
    captioner.dials = EVEN
    return rows


def swapped_nouns(captioner: Captioner, examples: list[Example], most: int, weak: float | None) -> dict:
    """One caption of each photograph that has a frequent noun, and the copy with another noun."""
    good, bad, found, flagged, changed, gone = [], [], [], [], [], []
    assert captioner.reward is not None
    limit = captioner.reward.weak if weak is None else weak
    corpus, editor = build_corpus(captioner.eyes, examples, Path("cache")), captioner.editor
    for i, example in enumerate(examples[:most]):
        text = example.captions[i % len(example.captions)]
        swapped = swap_noun(text, random.Random(seed_of(0, "noun", example.key)))
        if swapped is None:
            continue
        audits = [editor.repair(caption, corpus.image([i]), corpus.joint[[i]], example.key, 0, weak) for caption in (text, swapped)]
        good.append(audits[0].suspicion)
        bad.append(audits[1].suspicion)
        wrong = next(b for a, b in zip(text.split(), swapped.split(), strict=True) if a != b)
        found.append(max(audits[1].words, key=lambda word: word.suspicion).word == wrong)
        flagged += [word.suspicion >= limit for word in audits[0].words if word.confidence is not None]
        changed.append(audits[0].text != text)
        gone.append(wrong not in audits[1].text.split())
    rng = np.random.default_rng(0)
    draws = [auc(np.array(bad)[rows].tolist(), np.array(good)[rows].tolist()) for rows in rng.integers(len(good), size=(200, len(good)))]
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "captions": len(good), "auc": {"value": auc(bad, good), "low": float(low), "high": float(high)},
        "most_suspicious_word_is_the_swapped": float(np.mean(found)), "untouched_90_percent_below": float(np.quantile(good, 0.9)),
        "weak": limit, "untouched_words_weak": float(np.mean(flagged)), "untouched_changed": float(np.mean(changed)),
        "swapped_noun_gone": float(np.mean(gone)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["scenes", "photographs"])
    parser.add_argument("models", type=Path)
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--weak", type=float, help="suspicion from which a word is taken back (default: the model's own)")
    parser.add_argument("--most", type=int, default=10_000, help="captions at most")
    parser.add_argument("--output", type=Path, required=True, help="JSON; what it holds of the other kind stays")
    args = parser.parse_args()
    captioner = Captioner.from_pretrained(args.models)
    examples = load_examples(captioner.eyes.config.data, captioner.eyes.config.seed)[args.split]
    if args.kind == "scenes":
        found = {"repair": repairs(captioner, examples, args.most, args.weak)}
        print(json.dumps(found), flush=True)
        found |= {"specificity": dials(captioner, examples)}
    else:
        found = swapped_nouns(captioner, examples, args.most, args.weak)
        print(json.dumps(found), flush=True)
    kept = json.loads(args.output.read_text()) if args.output.exists() else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(kept | {args.kind: {"split": args.split} | found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
