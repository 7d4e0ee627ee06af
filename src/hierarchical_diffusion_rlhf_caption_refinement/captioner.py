"""The five-line library face: `Captioner.from_pretrained("models")("photo.jpg")[0].text`."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from .data.images import load_image, prepared
from .data.text import contains, decode, decode_rows, pad, said, spell, spellings, unknown_id, words_and_owners
from .evaluation.evaluate import best_candidates, fit_of, pick
from .models.alignment import PretrainedClip, leave_one_word_out
from .models.beam import search_or_denoise
from .models.denoiser import DiffusionCaptionModel
from .models.diffusion import HIDDEN
from .models.reward import EVEN, QUALITIES, RewardModel
from .models.sampler import LAYOUTS, Given, Trajectory, layouts, likelihood, noise_for, thin
from .models.saved import Eyes, Kind
from .pretrained import Parts, load_parts, save_parts
from .repair import Editor, Repair
from .utils.config import ConfigError, SamplerConfig, with_overrides

MASK = "[MASK]"
NEAR = 2
"""Tokens by which a caption with given words may first differ in length from the free one."""
TOGETHER = 32
"""Images that one call captions at a time, however many it is given."""


checked = lru_cache(maxsize=64)(with_overrides)
"""A loop over images gives the same settings every time, and OmegaConf takes longer for them than a caption does."""


class ObedienceError(ValueError):
    """An image for which no caption was found that obeys; the message is one line."""


@dataclass(frozen=True)
class Wishes:
    """What every caption has to obey. Case and punctuation do not matter."""

    must_include: str | Sequence[str] = ()
    """Words or phrases; kept as a tuple."""
    ban: str | Sequence[str] = ()
    """Words or phrases that do not occur; likewise."""
    template: str = ""
    """The whole caption; each [MASK] stands for one or more words, as many as are likeliest."""
    min_words: int = 1
    max_words: int = 0
    """Bounds on the words; 0 means none."""
    prefix: str = ""
    suffix: str = ""
    """Put around the caption as they are; they do not count for anything above."""

    def __post_init__(self) -> None:
        for name in ("must_include", "ban"):  # a text is one phrase, not its letters; a list cannot be hashed
            phrases = getattr(self, name)
            object.__setattr__(self, name, (phrases,) if isinstance(phrases, str) else tuple(phrases))
        if empty := [text for text in (*self.must_include, *self.ban) if not said(text)]:
            raise ConfigError(f"'{empty[0]}' is an empty word: it cannot be included or banned")
        given = [said(text) for text in (*self.must_include, *self.template.split(MASK))]
        banned = [text for text in self.ban if any(contains(words, said(text)) for words in given)]
        if banned:
            raise ConfigError(f"'{banned[0]}' is banned and asked for at once")
        if self.template and MASK not in self.template:
            raise ConfigError(f"the template '{self.template}' leaves nothing open: write {MASK} where words are missing")
        if self.min_words < 1 or 0 < self.max_words < self.min_words:
            raise ConfigError(f"{self.min_words} to {self.max_words} words cannot be: at least 1, and not more than at most")

    def obeyed_by(self, text: str) -> bool:
        words = said(text)
        fits = self.min_words <= len(words) <= (self.max_words or len(words))
        included = all(contains(words, said(phrase)) for phrase in self.must_include)
        return fits and included and not any(contains(words, said(b)) for b in self.ban) and bool(self.frame.fullmatch(" ".join(words)))

    @cached_property
    def parts(self) -> list[str | None]:
        """The template's given parts, None for each [MASK]."""
        pieces = re.split(r"(\[MASK\])", self.template or MASK)
        return [None if piece == MASK else piece for piece in pieces if piece == MASK or said(piece)]

    @cached_property
    def frame(self) -> re.Pattern[str]:
        return re.compile(" ".join(r"\S+(?: \S+)*" if part is None else re.escape(" ".join(said(part))) for part in self.parts))


FREE = Wishes()


@dataclass(frozen=True)
class Orders:
    """Wishes in a model's tokens."""

    parts: list[Given | None]
    phrases: list[Given]
    banned: Tensor | None
    """(V,) bool: tokens that alone are a banned word."""
    strict: Tensor | None
    """The same, and the last token of every banned phrase."""

    @property
    def given(self) -> int:
        """The fewest tokens of a caption: a phrase fills an open part of the template or shares one; every other open part takes one."""
        told = sum(len(ids[1]) for ids in (*self.parts, *self.phrases) if ids is not None)
        return told + max(self.parts.count(None) - len(self.phrases), 0)


@dataclass(frozen=True)
class Token:
    token: str
    confidence: float
    """Probability of the likeliest token when this one was revealed."""
    step: int
    """Denoising step that revealed it."""


@dataclass(frozen=True)
class Word:
    word: str
    confidence: float
    """Of the least certain of its tokens."""
    step: int
    """Denoising step that completed it."""
    credit: float
    """Dense reward: what the caption's cosine with the image loses without the word; 0 for function words and repetitions."""


@dataclass(frozen=True)
class Caption:
    text: str
    confidence: float
    """Geometric mean of the tokens' confidence."""
    reward: float | None
    """How much people would like it, in spreads of the base model's captions around their mean; None without a reward model."""
    tokens: tuple[Token, ...]
    seed: int
    ids: tuple[int, ...] = field(default=(), repr=False)
    """The tokens' ids."""
    words: tuple[Word, ...] = ()
    """Where the reward comes from, word by word; only `Captioner.__call__` looks into it, `predict` leaves it out."""
    qualities: dict[str, float] | None = None
    """What the reward model thinks of accuracy, fluency and specificity: logits, 0 where its comparisons came without such reasons."""

    @property
    def steps(self) -> int:
        """Denoising steps that it took."""
        return max((token.step for token in self.tokens), default=0)


@dataclass(frozen=True)
class Seen:
    """A picture, as the models see it."""

    key: str
    tokens: Tensor
    """(1, P, F)"""
    joint: Tensor
    """(1, E), by CLIP"""


class Captioner:
    """A trained model that captions images. The same image, seed and settings give the same caption, whatever else is in the batch."""

    parts: Parts
    """What it was read from, for saving it again; only `from_pretrained` sets it."""

    def __init__(self, eyes: Eyes, model: DiffusionCaptionModel, reward: RewardModel | None, plan: SamplerConfig) -> None:
        self.eyes, self.model, self.reward, self.plan = eyes, model.eval(), reward, plan
        self.dials = EVEN
        """How much accuracy, fluency and specificity count wherever the reward decides: among candidates, and in repairs."""
        self.orders = lru_cache(maxsize=8)(self.spelled)
        if isinstance(eyes.vision, torch.nn.Module):
            eyes.vision.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, kind: Kind | None = None, device: torch.device | str = "cpu") -> "Captioner":
        """From a folder or a hub id as `save_pretrained` and `push_to_hub` leave them, or from a run's checkpoint or folder of checkpoints:
        its refined model unless `kind` says base, with the reward model beside it, or of the run that it started from.

        Raises CheckpointError.
        """
        parts = load_parts(path, kind)
        reward = parts.reward and parts.reward.to(device)
        captioner = cls(parts.eyes.to(device), parts.denoiser.to(device), reward, parts.eyes.config.sampler)
        captioner.parts = parts
        return captioner

    def save_pretrained(self, folder: str | Path) -> None:
        """In Hugging Face's layout, with a model card; nothing pickled. For captioners that came from `from_pretrained`."""
        save_parts(Path(folder), self.parts)

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """The same to the hub, where you are logged in (`hf auth login`); returns the address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    def __call__(
        self, images: str | Path | Image | Sequence[str | Path | Image], seed: int = 0, wishes: Wishes = FREE, **settings: object
    ) -> list[Caption]:
        """A caption per image (path or picture); `settings` are fields of SamplerConfig, e.g. steps=4, max_words=8.

        Raises ImageError for an image that cannot be read, ConfigError for settings and wishes that cannot be, ObedienceError if no caption
        was found that obeys.
        """
        several = [images] if isinstance(images, str | Path | Image) else list(images)
        if not several:
            return []
        plan, captions = self.planned(settings), list[Caption]()
        for first in range(0, len(several), TOGETHER):
            seen = [self.look(image) for image in several[first : first + TOGETHER]]
            for one, caption in zip(seen, self.write(seen, plan, seed, wishes), strict=True):
                if isinstance(caption, ObedienceError):
                    raise caption
                captions.append(self.explained(caption, one))
        return captions

    def stream(self, image: str | Path | Image, seed: int = 0, wishes: Wishes = FREE, **settings: object) -> Iterator[Caption]:
        """The caption while it is denoised, [MASK] where a word is still to come: before the first step (its length comes first; with
        an open end one more word is to come), after each step, and at last, complete, that of a call, which alone has a reward and a
        confidence.

        Shown is the first caption drawn. What takes its place, a better candidate or one found to obey, and the outcome of a beam search
        come at once, as the last. Raises what a call raises.
        """
        seen = self.look(image)
        plan = self.bounded(self.planned(settings), wishes)
        for written in self.drawn([seen], plan, seed, None, self.orders(wishes).banned):
            draft = self.describe(written, 0, None, seed)
            if any(token.token == MASK for token in draft.tokens):
                yield replace(draft, confidence=0.0, text=f"{wishes.prefix}{draft.text}{wishes.suffix}")
        best, score = self.judged([seen], plan, written)  # pyright: ignore[reportPossiblyUnboundVariable]
        caption = self.settled(seen, 0, best, score, plan, seed, wishes)
        if isinstance(caption, ObedienceError):
            raise caption
        yield self.explained(caption, seen)

    def planned(self, settings: Mapping[str, object]) -> SamplerConfig:
        """The plan with these settings, checked as those of the command line are. Raises ConfigError."""
        return checked(
            replace(self.eyes.config, sampler=self.plan), tuple(f"sampler.{name}={value}" for name, value in settings.items())
        ).sampler

    @torch.no_grad()
    def explained(self, caption: Caption, seen: Seen) -> Caption:
        """With the reward's parts: the dense credit of every word, and the qualities."""
        words, owners = words_and_owners(self.eyes.tokenizer)(caption.ids)
        credit = leave_one_word_out(self.eyes.alignment, [words], [range(len(words))], seen.joint, len(words))[0].tolist()
        told = []
        for i, word in enumerate(words):
            own = [token for token, owner in zip(caption.tokens, owners, strict=True) if owner == i]
            told.append(Word(word, min((t.confidence for t in own), default=1.0), max((t.step for t in own), default=0), credit[i]))
        if self.reward is None:
            return replace(caption, words=tuple(told))
        x0, length = (x.to(self.model.mask.device) for x in pad([caption.ids], self.model.max_length))
        scores = self.reward.members(x0, length, seen.tokens, seen.joint).mean(0)[0, 1:].tolist()  # the first is the total
        return replace(caption, words=tuple(told), qualities=dict(zip(QUALITIES[1:], scores, strict=True)))

    def audit(self, image: str | Path | Image, caption: str) -> Repair:
        """How well each word of a caption fits the image. Raises ImageError, and ValueError for a caption without words."""
        seen = self.look(image)
        return self.editor.audit(caption, seen.tokens, seen.joint)

    def refine(self, image: str | Path | Image, caption: str, weak: float | None = None, seed: int = 0) -> Repair:
        """The caption, with better words for those of at least `weak` suspicion (nats; default: the model's own threshold) where the reward
        model finds them better.

        Raises ImageError, and ValueError for a caption without words or a captioner without a reward model.
        """
        seen = self.look(image)
        return self.editor.repair(caption, seen.tokens, seen.joint, seen.key, seed, weak)

    @property
    def editor(self) -> Editor:
        """By the base model where there is one: reinforcement learning leaves its successor sure of too much to doubt a word."""
        denoiser = self.reward.evidence.denoiser if self.reward else self.model
        return Editor(denoiser, self.eyes.tokenizer, self.reward, self.dials)

    @torch.no_grad()
    def look(self, image: str | Path | Image) -> Seen:
        """What the models see of a picture; alone, so that it is the same in every company. Raises ImageError."""
        picture = prepared(image) if isinstance(image, Image) else load_image(image)
        tokens = self.eyes.vision.encode([picture]).to(torch.float16).float().to(self.model.mask.device)  # as the feature cache keeps them
        alignment = self.eyes.alignment
        joint = alignment.embed_images(alignment.encode([picture]) if isinstance(alignment, PretrainedClip) else tokens)
        return Seen(content_key(picture), tokens, joint)

    def write(self, seen: Sequence[Seen], plan: SamplerConfig, seed: int, wishes: Wishes = FREE) -> list[Caption | ObedienceError]:
        """A caption per picture, or why there is none. Raises ConfigError for wishes that the model cannot fulfil."""
        plan = self.bounded(plan, wishes)
        if not seen:
            return []
        written, score = self.draw(seen, plan, seed, None, self.orders(wishes).banned)
        return [self.settled(one, i, written, score, plan, seed, wishes) for i, one in enumerate(seen)]

    def settled(
        self, seen: Seen, row: int, written: Trajectory, score: Tensor | None, plan: SamplerConfig, seed: int, wishes: Wishes
    ) -> Caption | ObedienceError:
        """The caption in that row or, if it does not obey, one that is searched for."""
        caption: Caption | ObedienceError = self.describe(written, row, float(score[row]) if score is not None else None, seed)
        if not wishes.obeyed_by(caption.text):
            caption = self.search(seen, plan, seed, wishes, int(written.length[row]))
        return replace(caption, text=f"{wishes.prefix}{caption.text}{wishes.suffix}") if isinstance(caption, Caption) else caption

    def draw(
        self, seen: Sequence[Seen], plan: SamplerConfig, seed: int, known: Tensor | None, banned: Tensor | None
    ) -> tuple[Trajectory, Tensor | None]:
        """Captions of each picture, the best of every `plan.candidates` by reward, and their rewards."""
        *_, written = self.drawn(seen, plan, seed, known, banned)
        return self.judged(seen, plan, written)

    def drawn(
        self, seen: Sequence[Seen], plan: SamplerConfig, seed: int, known: Tensor | None, banned: Tensor | None
    ) -> Iterator[Trajectory]:
        """`plan.candidates` captions of each picture in the making, at last complete; `known`: drafts, as in `sample`."""
        device, group = self.model.mask.device, plan.candidates * (1 if known is None else len(known))
        noise = noise_for([s.key for s in seen], group, plan.steps, self.model.max_length, seed).to(device)
        drafts = None if known is None else known.to(device).repeat_interleave(plan.candidates, 0)
        tokens, joint = torch.cat([s.tokens for s in seen]), torch.cat([s.joint for s in seen])
        fit = fit_of(self.eyes.alignment, self.eyes.tokenizer, joint) if plan.clip else None
        return search_or_denoise(self.model, tokens, plan, noise, drafts, banned, fit)

    @torch.no_grad()
    def judged(self, seen: Sequence[Seen], plan: SamplerConfig, written: Trajectory) -> tuple[Trajectory, Tensor | None]:
        tokens, joint = torch.cat([s.tokens for s in seen]), torch.cat([s.joint for s in seen])
        score = self.reward.score(written.x0, written.length, tokens, joint, self.dials) if self.reward else None
        return best_candidates(written, score, plan.candidates) if plan.candidates > 1 else (written, score)

    def search(self, seen: Seen, plan: SamplerConfig, seed: int, wishes: Wishes, length: int) -> Caption | ObedienceError:
        """Of captions with the given words at every place, one that obeys and has the highest reward (likelihood, without a reward model).

        Lengths near the free caption's come first, many draws at temperature 1 last; banned phrases are masked only where they must be.
        """
        orders, width = self.orders(wishes), self.model.max_length
        every = range(plan.min_words, min(plan.max_words or width, width) + 1)
        near = [n for n in every if abs(n - length) <= NEAR]
        bold = replace(plan.plain, temperature=max(plan.temperature, 1.0), candidates=plan.candidates)
        for lengths, banned, how in (
            (near, orders.banned, plan), (near, orders.strict, plan), (every, orders.strict, plan), (every, orders.strict, bold),
        ):  # fmt: skip
            rows = thin([row for n in lengths for row in layouts(n, orders.parts, orders.phrases)])
            if not rows:
                continue
            rows *= LAYOUTS // len(rows) if how is bold else 1
            known = torch.tensor([row + [HIDDEN] * (width - len(row)) for row in rows])
            written, score = self.draw([seen], how, seed, known, banned)
            texts = decode_rows(self.eyes.tokenizer, written.x0, written.length)
            if good := [i for i, text in enumerate(texts) if wishes.obeyed_by(text)]:
                written, score = pick(written, torch.tensor(good)), None if score is None else score[good]
                chosen = likelihood(self.model, written.x0, written.length, seen.tokens) if score is None else score
                best = int(chosen.argmax())
                return self.describe(written, best, None if score is None else float(score[best]), seed)
        return ObedienceError("no caption was found that obeys all of what is asked for")

    def bounded(self, plan: SamplerConfig, wishes: Wishes) -> SamplerConfig:
        """The plan within the wished bounds: exactly where a token is a word, else as far as words bound tokens (each has one or more)."""
        high = wishes.max_words if unknown_id(self.eyes.tokenizer) >= 0 else 0
        low = max(plan.min_words, wishes.min_words)
        if low > self.model.max_length:
            raise ConfigError(f"a caption has at most {self.model.max_length} tokens, not {low}")
        plan = replace(plan, min_words=low, max_words=min(high or plan.max_words, plan.max_words or high))
        most, given = min(plan.max_words or self.model.max_length, self.model.max_length), self.orders(wishes).given
        if given > most:
            raise ConfigError(f"the given words and what is between them take {given} tokens, a caption has at most {most}")
        return plan

    def spelled(self, wishes: Wishes) -> Orders:
        """Raises ConfigError for a word that the model does not know."""
        tokenizer = self.eyes.tokenizer
        texts = {tuple(said(text)): text for text in (*wishes.must_include, *(part for part in wishes.parts if part))}
        phrases = {tuple(said(text)): text for text in wishes.must_include}
        loose = [text for words, text in phrases.items() if sum(contains(other, words) for other in texts) == 1]

        def given(text: str) -> Given:
            return spell(tokenizer, text, True), spell(tokenizer, text, False)

        alone = {i for text in wishes.ban if len(said(text)) == 1 for i in spellings(tokenizer, said(text)[0])}
        last = alone.copy()
        for text in wishes.ban:
            with contextlib.suppress(ConfigError):  # what the model does not know it never says
                last |= {ids[-1] for ids in given(text)}
        allowed = self.model.allowed
        masks = [
            torch.isin(torch.arange(len(allowed), device=allowed.device), torch.tensor(sorted(ids), device=allowed.device))
            for ids in (alone, last)
        ]
        if wishes.ban and not (allowed & ~masks[0]).any():
            raise ConfigError("every word that the model knows is banned")
        banned, strict = masks if wishes.ban else (None, None)
        if strict is not None and not (allowed & ~strict).any():
            strict = banned
        return Orders([None if part is None else given(part) for part in wishes.parts], [given(text) for text in loose], banned, strict)

    def describe(self, written: Trajectory, row: int, reward: float | None, seed: int) -> Caption:
        n = int(written.length[row])
        ids, confidence, step = written.x0[row, :n].tolist(), written.confidence[row, :n].tolist(), written.step[row, :n].tolist()
        tokenizer, parts = self.eyes.tokenizer, list[str]()
        for open_, run in groupby(zip(step, ids, strict=True), lambda pair: pair[0] == HIDDEN):
            some = [i for _, i in run]
            parts += [MASK] * len(some) if open_ else [decode(tokenizer, some)]
        told = zip(ids, confidence, step, strict=True)
        tokens = tuple(Token(MASK, 0.0, 0) if s == HIDDEN else Token(decode(tokenizer, [i]), c, s) for i, c, s in told)
        mean = float(np.exp(np.log(np.maximum(confidence, 1e-9)).mean()))
        return Caption(" ".join(parts), mean, reward, tokens, seed, tuple(ids))


def content_key(picture: Image) -> str:
    """Names the noise of a picture by what it shows, so that copies of a file get the same caption."""
    small = picture.convert("RGB").resize((16, 16))
    return small.tobytes().hex()
