"""Captions that are there already, from any captioner or from people: which of their words do not fit, and better words in their place.

A word is suspicious by as much as the denoiser, who sees the image and all other words, would rather say another. Suspicious words are
taken back and filled in again, with a neighbour where one has to agree ("a red", "an orange"); what is kept must be liked better by the
reward model, and must pay for every word that it changes. Axes: B ways to write a caption, T caption length.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor

from .data.corpus import Corpus
from .data.text import decode, pad, said, unknown_id, words_and_owners
from .models.alignment import leave_one_word_out
from .models.denoiser import DiffusionCaptionModel
from .models.diffusion import HIDDEN
from .models.reward import EVEN, Dials, RewardModel
from .models.sampler import UNKNOWN, noise_for, sample, score
from .utils.config import SamplerConfig

RARE, USUAL = 0.04, 200
"""Share of the words of correct captions that are taken back nevertheless, and validation images that tell from which suspicion on."""
TRUST, PRICE = 0.5, 0.9
"""Reward that a nat is worth by which the denoiser finds a caption likelier, and that every changed word costs; chosen on validation
scenes. Nats count as far as the image gives them: a word that is only more usual gains nothing."""
TRIES = 8
"""Fillings drawn for each hole, besides the likeliest."""
ROUNDS = 3
"""Most repairs of one caption, one after the other."""
MOST = 20.0
"""Suspicion does not grow beyond this."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Word:
    word: str
    confidence: float | None
    """Its probability given the image and all other words; None for a word that the model does not know."""
    suspicion: float
    """Nats by which another word is likelier in its place, the word before it known or not, whichever is more; 0 if it is not known."""
    instead: str
    """That other word; empty if there is none."""
    credit: float | None
    """What the caption's alignment with the image loses without it, in cosines; 0 for function words, None without a reward model."""


@dataclass(frozen=True)
class Repair:
    text: str
    """The draft where nothing better was found."""
    draft: str
    suspicion: float
    """Of the draft's most suspicious word."""
    reward: float | None
    draft_reward: float | None
    words: tuple[Word, ...]
    """Of the draft, as far as the model can read: a caption of its greatest length."""


@dataclass(frozen=True)
class Draft:
    """A caption in tokens, and where its words are."""

    text: str
    ids: list[int]
    owner: list[int]
    """The word of each token."""
    spans: list[Span]
    """First character of each word, and the one after its last."""

    def tokens(self, first: int, last: int) -> Span:
        """Where the tokens of these words begin and end."""
        return self.owner.index(first), len(self.owner) - self.owner[::-1].index(last)


def read_draft(tokenizer: Tokenizer, text: str, most: int) -> Draft:
    """The first `most` tokens of a text. Raises ValueError if it has no word."""
    found = tokenizer.encode(text, add_special_tokens=False)
    ids, owner, spans = found.ids[:most], [], []
    previous = None
    for word, (start, end) in zip(found.word_ids[:most], found.offsets[:most], strict=True):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        if word != previous:
            spans.append((start, end))
        spans[-1], previous = (spans[-1][0], end), word
        owner.append(len(spans) - 1)
    if not ids:
        raise ValueError("no caption to look at")
    return Draft(text, ids, owner, spans)


@dataclass(frozen=True)
class Editor:
    """What it takes to judge and to repair captions; without a reward model they can only be judged."""

    denoiser: DiffusionCaptionModel
    tokenizer: Tokenizer
    reward: RewardModel | None
    dials: Dials = EVEN

    @torch.no_grad()
    def words(self, draft: Draft, image: Float[Tensor, "1 P F"], joint: Float[Tensor, "1 E"] | None) -> list[Word]:
        """How well each word fits, judged twice: given all others, and given all but the one before it, which may give it away."""
        count, n = len(draft.spans), len(draft.ids)
        owner, place = torch.tensor(draft.owner, device=image.device), torch.arange(n, device=image.device)
        word = torch.arange(count, device=image.device).repeat(2)[:, None]
        asked = owner == word
        hidden = (owner == word - 1) & (torch.arange(2 * count, device=image.device) >= count)[:, None]
        step = torch.where(asked, 1 + place, torch.where(hidden, HIDDEN - 1, 0))
        x0 = torch.tensor([draft.ids], device=image.device)
        logp = self.denoiser(x0.expand(2 * count, -1), step, torch.full((2 * count,), n, device=image.device), image).logits.log_softmax(-1)
        own, best = logp.gather(-1, x0[..., None].expand(2 * count, -1, 1)).squeeze(-1), logp.max(-1)
        doubt = ((best.values - own) * asked).nan_to_num(0.0, 0.0, 0.0).sum(1).clamp(max=MOST).view(2, count)
        sure = torch.where(asked, own, 0.0).sum(1)[:count].exp().tolist()
        credit = self.credit(draft, joint)
        found = []
        for i, (start, end) in enumerate(draft.spans):
            known, how = unknown_id(self.tokenizer) not in draft.ids[slice(*draft.tokens(i, i))], int(doubt[:, i].argmax())
            instead = decode(self.tokenizer, best.indices[how * count + i, slice(*draft.tokens(i, i))].tolist())
            suspicion = float(doubt[how, i]) if known else 0.0
            found.append(Word(draft.text[start:end], sure[i] if known else None, suspicion, instead if suspicion else "", credit[i]))
        return found

    def credit(self, draft: Draft, joint: Tensor | None) -> list[float] | list[None]:
        if self.reward is None or joint is None:
            return [None] * len(draft.spans)
        words, owners = words_and_owners(self.tokenizer)(draft.ids)
        token = leave_one_word_out(self.reward.evidence.alignment, [words], [owners], joint, len(draft.ids))[0]
        return [float(token[slice(*draft.tokens(i, i))].sum()) for i in range(len(draft.spans))]

    def audit(self, text: str, image: Tensor, joint: Tensor | None) -> Repair:
        """The words' suspicion and the reward; nothing is changed. Raises ValueError for a text without words."""
        draft = read_draft(self.tokenizer, text, self.denoiser.max_length)
        words = self.words(draft, image, joint)
        reward = None
        if self.reward is not None and joint is not None:
            x0, length = (part.to(image.device) for part in pad([draft.ids], self.denoiser.max_length))
            reward = float(self.reward.score(x0, length, image, joint, self.dials))
        return Repair(text, text, max(w.suspicion for w in words), reward, reward, tuple(words))

    def usual(self, corpus: Corpus) -> float:
        """The suspicion that only a share RARE of the words of a data set's captions reach; the best-liked caption of each image is looked
        at, for others may be wrong."""
        assert self.reward is not None
        words, device = list[Word](), self.denoiser.mask.device
        for i, example in enumerate(corpus.examples[:USUAL]):
            image, joint = corpus.image([i]).to(device), corpus.joint[[i]].to(device)
            if drafts := [read_draft(self.tokenizer, text, self.denoiser.max_length) for text in example.captions if said(text)]:
                x0, length = (part.to(device) for part in pad([draft.ids for draft in drafts], self.denoiser.max_length))
                words += self.words(drafts[int(self.reward.score(x0, length, image, joint).argmax())], image, None)
        return float(np.quantile([word.suspicion for word in words if word.confidence is not None], 1 - RARE))

    def repair(self, text: str, image: Tensor, joint: Tensor | None, key: str, seed: int, weak: float | None = None) -> Repair:
        """The caption with better words for those of at least `weak` suspicion (default: the reward model's own threshold), where there
        are any; `key` names the noise.

        Raises ValueError for a text without words, or without a reward model.
        """
        if self.reward is None or joint is None:
            raise ValueError("a repair needs a reward model to judge it")
        weak = self.reward.weak if weak is None else weak
        found = self.audit(text, image, joint)
        words: Sequence[Word] = found.words
        for _ in range(ROUNDS):
            draft = read_draft(self.tokenizer, found.text, self.denoiser.max_length)
            better = self.better(draft, [i for i, w in enumerate(words) if w.suspicion >= weak and w.suspicion], image, joint, key, seed)
            if better is None:
                break
            found = replace(found, text=better[0], reward=better[1])
            words = self.words(read_draft(self.tokenizer, found.text, self.denoiser.max_length), image, joint)
        return found

    @torch.no_grad()
    def better(self, draft: Draft, weak: Sequence[int], image: Tensor, joint: Tensor, key: str, seed: int) -> tuple[str, float] | None:
        """The best other way to write the draft and its reward, None if the draft itself is best."""
        assert self.reward is not None
        known = [i for i in range(len(draft.spans)) if unknown_id(self.tokenizer) not in draft.ids[slice(*draft.tokens(i, i))]]
        holes = {(a, b) for i in weak for a, b in ((i, i), (i - 1, i), (i, i + 1)) if a in known and b in known}
        others = self.fillings(draft, sorted(holes), image, key, seed) if holes else {}
        others.pop(draft.text, None)
        if not others:
            return None
        x0, length = (part.to(image.device) for part in pad([draft.ids, *others.values()], self.denoiser.max_length))
        reward = self.reward.score(x0, length, image, joint, self.dials)
        likely, blind = (self.nats(x0, length, image, seen) for seen in (True, False))
        gain = torch.minimum(likely - likely[0], (likely - blind) - (likely - blind)[0])
        price = torch.tensor([0, *(changed(draft.text, text) for text in others)], device=image.device)
        gain = (reward - reward[0]) + TRUST * gain - PRICE * price
        gain = torch.where(reward > reward[0], gain, -torch.inf)
        best = int(gain.argmax())
        return (list(others)[best - 1], float(reward[best])) if gain[best] > 0 else None

    def nats(self, x0: Tensor, length: Tensor, image: Tensor, seen: bool) -> Float[Tensor, " B"]:
        """Log-likelihood of whole captions, read from the left, with or without the image; words that are not known cancel out."""
        rows = self.denoiser.from_left(x0, length)
        return score(self.denoiser, *rows, image, seen=torch.tensor([seen], device=x0.device)).logp.clamp(min=-100).sum(1)

    def fillings(self, draft: Draft, holes: Sequence[Span], image: Tensor, key: object, seed: int) -> dict[str, list[int]]:
        """Captions with other words in place of the words from the first to the last of a hole, and their tokens."""
        width = self.denoiser.max_length
        rows: list[tuple[Span, list[int]]] = []
        for hole in holes:
            start, end = draft.tokens(*hole)
            n = end - start
            sizes = [n] if unknown_id(self.tokenizer) >= 0 else [m for m in (n - 1, n, n + 1) if 0 < m <= width - len(draft.ids) + n]
            rows += [(hole, [*draft.ids[:start], *[UNKNOWN] * m, *draft.ids[end:]]) for m in sizes]
        steps, found = max(row.count(UNKNOWN) for _, row in rows), {}
        known = torch.tensor([row + [HIDDEN] * (width - len(row)) for _, row in rows], device=image.device)
        for temperature, tries in ((0.0, 1), (1.0, TRIES)):
            plan = SamplerConfig(steps=steps, order="confidence", temperature=temperature)
            noise = noise_for([(key, *row) for row in rows], tries, steps, width, seed).to(image.device)
            written = sample(self.denoiser, image, plan, noise, known.repeat_interleave(tries, 0))
            for i, (ids, length) in enumerate(zip(written.x0.tolist(), written.length.tolist(), strict=True)):
                hole = rows[i // tries][0]
                start, end = draft.tokens(*hole)
                new = decode(self.tokenizer, ids[start : length - len(draft.ids) + end]).split()
                found[spliced(draft, hole, new)] = ids[:length]
        return found


def spliced(draft: Draft, hole: Span, new: Sequence[str]) -> str:
    """The text with new words in the hole; all else stays as it is, capital letters and punctuation too."""
    text, spans = draft.text, draft.spans[hole[0] : hole[1] + 1]
    if len(spans) != len(new):
        spans, new = [(spans[0][0], spans[-1][1])], [" ".join(new)]
    for (start, end), word in reversed(list(zip(spans, new, strict=True))):
        old = text[start:end]
        if old.lower() != word.lower():
            text = text[:start] + (word[:1].upper() + word[1:] if old[:1].isupper() else word) + text[end:]
    return text


def _edits(draft: str, text: str) -> list[tuple[list[str], list[str]]]:
    """Pieces of both, in turn: alike, or the words that were replaced."""
    a, b = draft.split(), text.split()
    return [(a[i:j], b[k:m]) for _, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()]


def changed(draft: str, text: str) -> int:
    """How many words are different."""
    return sum(max(len(old), len(new)) for old, new in _edits(draft, text) if old != new)


def diff(draft: str, text: str) -> str:
    """One line with both: "a [-red-] {+blue+} circle"."""
    words: list[str] = []
    for old, new in _edits(draft, text):
        words += old if old == new else [*(f"[-{w}-]" for w in old), *(f"{{+{w}+}}" for w in new)]
    return " ".join(words)
