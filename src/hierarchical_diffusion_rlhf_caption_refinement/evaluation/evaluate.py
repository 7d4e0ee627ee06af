"""Captions for a whole split, and what they are worth: by the scenes' truth, by human references, by reward and alignment models.

Axes: N images, B = N x G captions, T caption length.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor

from ..data.corpus import Corpus
from ..data.features import load_features
from ..data.images import CROPS, look
from ..data.scenes import check
from ..data.sources import Example
from ..data.text import decode_rows
from ..models.alignment import Alignment, PretrainedClip, ranks, text_scores
from ..models.beam import Fit, search_or_denoise
from ..models.denoiser import DiffusionCaptionModel
from ..models.reward import RewardModel
from ..models.sampler import Trajectory, noise_for
from ..models.saved import Eyes
from ..utils.config import BaseConfig, SamplerConfig
from . import metrics

QUALITIES = ("accuracy", "specificity", "fluency", "utility")


@dataclass(frozen=True)
class Written:
    """Captions of rows of a corpus; those of one image stand together."""

    texts: list[str]
    trajectory: Trajectory
    reward: Float[Tensor, " B"] | None


PARTS = ("x0", "step", "length", "told", "logp", "confidence", "length_logp")
"""Of a trajectory, without its drafts."""


def concatenate(some: Sequence[Trajectory]) -> Trajectory:
    return Trajectory(**{name: torch.cat([getattr(t, name) for t in some]) for name in PARTS}, drafts=None)


def pick(trajectory: Trajectory, rows: Tensor) -> Trajectory:
    return Trajectory(**{name: getattr(trajectory, name)[rows] for name in PARTS}, drafts=None)


def best_candidates(trajectory: Trajectory, score: Tensor | None, candidates: int) -> tuple[Trajectory, Tensor]:
    """Of every `candidates` captions in a row the one with the highest reward. Raises ValueError without a reward."""
    if score is None:
        raise ValueError("sampler.candidates > 1 needs a reward model to choose by")
    best = score.view(-1, candidates).argmax(1) + torch.arange(0, len(score), candidates, device=score.device)
    return pick(trajectory, best), score[best]


OWN = 0.25
"""Weight of an image's own captions beside those of the images most like it."""

Worth = Callable[[Corpus, Sequence[int], Trajectory], Float[Tensor, " B"]]
"""What captions of these rows of a corpus are worth; those of one image stand together."""


def preference(reward: RewardModel) -> Worth:
    """How much people would like the captions, as the reward model has it."""

    def worth(corpus: Corpus, rows: Sequence[int], t: Trajectory) -> Tensor:
        device = t.x0.device
        return reward.score(t.x0, t.length, corpus.image(rows).to(device), corpus.joint[list(rows)].to(device))

    return worth


def agreement(train: Corpus, neighbours: int = 0, repeated: float = 0.0) -> Worth:
    """CIDEr-D of captions with their image's own, 0 to 10; the training images' captions tell which words are rare.

    With `neighbours` a quarter of it; three quarters are CIDEr-D with the captions of so many training images that CLIP holds for the most
    alike: what one image's captions happen to say is mostly chance, and a model that was taught them knows them by heart.
    A caption that says something twice loses `repeated`: CIDEr-D hardly minds.
    """
    said = [[metrics.tokenize(c) for c in e.captions] for e in train.examples]
    idf = metrics.rarity(said)

    def cider(candidates: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
        return metrics.cider_d(candidates, [refs for refs in references for _ in range(len(candidates) // len(references))], idf)

    def worth(corpus: Corpus, rows: Sequence[int], t: Trajectory) -> Tensor:
        candidates = [metrics.tokenize(text) for text in decode_rows(corpus.tokenizer, t.x0, t.length)]
        scores = cider(candidates, [[metrics.tokenize(c) for c in corpus.examples[row].captions] for row in rows])
        if neighbours:
            alike = [[ref for other in some for ref in said[other]] for some in most_alike(corpus, rows, train, neighbours)]
            scores = OWN * scores + (1 - OWN) * cider(candidates, alike)
        scores -= repeated * np.array([metrics.repeats(c) for c in candidates])
        return torch.from_numpy(scores).to(t.x0.device, torch.float32)

    return worth


def most_alike(corpus: Corpus, rows: Sequence[int], train: Corpus, count: int) -> list[list[int]]:
    """Rows of the training images nearest to each of these images in the joint space, without the image itself."""
    near = (corpus.joint[list(rows)] @ train.joint.T).topk(min(count + 1, len(train)), dim=1).indices.tolist()
    keys = [corpus.examples[row].key for row in rows]
    return [[other for other in some if train.examples[other].key != key][:count] for key, some in zip(keys, near, strict=True)]


def fit_of(alignment: Alignment, tokenizer: Tokenizer, joint: Float[Tensor, "N E"]) -> Fit:
    """CLIP's cosine of captions with their images, for a search among several captions of each."""

    def fit(x0: Tensor, length: Tensor) -> Tensor:
        return text_scores(alignment, decode_rows(tokenizer, x0, length), joint.repeat_interleave(len(x0) // len(joint), 0))

    return fit


@torch.no_grad()
def write_captions(
    model: DiffusionCaptionModel,
    corpus: Corpus,
    rows: Sequence[int],
    plan: SamplerConfig,
    seed: int,
    reward: RewardModel | None = None,
    alignment: Alignment | None = None,
    group: int = 1,
    chunk: int = 64,
) -> Written:
    """`group` captions of each row; with `plan.candidates` > 1 each is the best of so many by reward. Independent of `chunk`.

    `alignment` is for `plan.clip`, which counts nothing without it.
    """
    device = model.mask.device
    parts: list[Trajectory] = []
    scores: list[Tensor] = []
    for start in range(0, len(rows), chunk):
        some = rows[start : start + chunk]
        keys = [corpus.examples[row].key for row in some]
        noise = noise_for(keys, group * plan.candidates, plan.steps, model.max_length, seed).to(device)
        image, joint = corpus.image(some).to(device), corpus.joint[list(some)].to(device)
        fit = fit_of(alignment, corpus.tokenizer, joint) if alignment is not None else None
        *_, trajectory = search_or_denoise(model, image, plan, noise, fit=fit)
        score = reward.score(trajectory.x0, trajectory.length, image, joint) if reward else None
        if plan.candidates > 1:
            trajectory, score = best_candidates(trajectory, score, plan.candidates)
        parts.append(trajectory)
        scores += [score.cpu()] if score is not None else []
    trajectory = concatenate(parts)
    return Written(decode_rows(corpus.tokenizer, trajectory.x0, trajectory.length), trajectory, torch.cat(scores) if scores else None)


def gold_qualities(captions: Sequence[str], examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """The scenes' hidden truth about captions: QUALITIES and words; {} of photographs. For evaluation only; it never reaches training."""
    found = [check(text, example.scene) for text, example in zip(captions, examples, strict=True) if example.scene is not None]
    if not found:
        return {}
    return {q: np.array([getattr(f, q) for f in found]) for q in QUALITIES} | {"mean_words": np.array([len(c.split()) for c in captions])}


def gold_summary(captions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in gold_qualities(captions, examples).items()}


def data_gold(examples: Sequence[Example]) -> dict[str, float]:
    """Quality of the data set's own captions."""
    pairs = [(caption, example) for example in examples for caption in example.captions]
    return gold_summary([c for c, _ in pairs], [e for _, e in pairs])


def reference_scores(captions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The usual captioning metrics against each image's own captions."""
    return {name: row["value"] for name, row in reference_intervals(captions, examples, draws=1).items()}


def reference_intervals(captions: Sequence[str], examples: Sequence[Example], draws: int = 500) -> dict[str, dict[str, float]]:
    """The same with 95 % intervals over images."""
    candidates = [metrics.tokenize(c) for c in captions]
    references = [[metrics.tokenize(r) for r in e.captions] for e in examples]
    counts = metrics.bleu_counts(candidates, references)
    found = {f"bleu_{n}": metrics.bootstrap_sums(counts, lambda total, n=n: metrics.bleu_of(total)[n - 1], draws) for n in range(1, 5)}
    for measure in (metrics.cider_d, metrics.rouge_l, metrics.specificity):
        found[measure.__name__] = metrics.bootstrap(measure(candidates, references), draws=draws)
    return {name: asdict(row) for name, row in found.items()}


@torch.no_grad()
def clip_scores(alignment: Alignment, captions: Sequence[str], corpus: Corpus) -> dict[str, dict[str, float]]:
    """CLIPScore and RefCLIPScore (Hessel et al. 2021) under the run's own alignment model: comparable within a run only."""
    texts = alignment.embed_texts(captions).cpu()
    fit = 2.5 * (texts * corpus.joint).sum(-1).clamp(min=0)
    best = torch.stack([(alignment.embed_texts(e.captions).cpu() @ text).max() for e, text in zip(corpus.examples, texts, strict=True)])
    both = 2 * fit * best.clamp(min=0) / (fit + best.clamp(min=0)).clamp(min=1e-8)
    return {name: interval_row(value.double().numpy()) for name, value in {"clip_score": fit, "ref_clip_score": both}.items()}


@torch.no_grad()
def retrieval(alignment: Alignment, corpus: Corpus) -> dict[str, float]:
    """Share of all captions whose own image is among the k that fit best, of all images of the split."""
    texts = [caption for example in corpus.examples for caption in example.captions]
    own = torch.tensor([row for row, example in enumerate(corpus.examples) for _ in example.captions])
    scores = alignment.embed_texts(texts).cpu() @ corpus.joint.T
    rank = ranks(scores, own)
    return {f"text_to_image_r{k}": float((rank < k).float().mean()) for k in (1, 5, 10)}


def text_statistics(captions: Sequence[str]) -> dict[str, float]:
    """What can go wrong without any reference: length, variety, repetition, dangling ends."""
    words = [metrics.tokenize(c) for c in captions]
    return {
        "mean_words": float(np.mean([len(w) for w in words])),
        "distinct_1": metrics.distinct_n(words, 1),
        "distinct_2": metrics.distinct_n(words, 2),
        "repetition": metrics.repetition(words),
        "bad_endings": metrics.bad_endings(words),
    }


def build_corpus(eyes: Eyes, examples: list[Example], cache: Path) -> Corpus:
    """Image tokens from the cache (computed on first use) and joint embeddings of a split."""
    tokens = load_features(examples, eyes.vision.encode, eyes.vision.fingerprint(), cache)
    seen = tokens
    if isinstance(eyes.alignment, PretrainedClip):
        seen = load_features(examples, eyes.alignment.encode, f"clip {eyes.alignment.fingerprint}", cache)
    with torch.no_grad():
        parts = (torch.from_numpy(seen[i : i + 256].astype(np.float32)).to(eyes.vision.device) for i in range(0, len(seen), 256))
        joint = torch.cat([eyes.alignment.embed_images(part).cpu() for part in parts])
    return Corpus(examples, tokens, joint, eyes.tokenizer, eyes.config.data.max_words)


def with_looks(corpus: Corpus, eyes: Eyes, config: BaseConfig, cache: Path, rank: int = 0, world: int = 1) -> Corpus:
    """The corpus with the tokens of its images seen as `config.mirror` and `config.crops` say, too.

    Process `rank` of `world` begins with looks of its own and finds what the others have made meanwhile.
    """

    def seen(place: tuple[float, float] | None, mirrored: bool) -> np.ndarray:
        name = " ".join(["mirrored"] * mirrored + [f"crop {place}"] * (place is not None))
        return load_features(
            corpus.examples,
            lambda images: eyes.vision.encode([look(image, place, mirrored) for image in images]),
            f"{eyes.vision.fingerprint()} {name}",
            cache,
        )

    crops = [(place, config.mirror and i % 2 == 1) for i, place in enumerate(CROPS[: config.crops])]
    looks = [(None, True)] * config.mirror + crops
    first = rank * len(looks) // world
    found = {how: seen(*how) for how in looks[first:] + looks[:first]}
    return replace(corpus, looks=tuple(found[how] for how in looks))


def interval_row(values: np.ndarray, groups: Sequence[object] | None = None) -> dict[str, float]:
    return asdict(metrics.bootstrap(values, groups))
