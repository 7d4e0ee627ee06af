"""Stage 0: contrastive training of the alignment model on the training captions, with the image encoder when it is ours.

Axes: N images = B captions in a batch, P image tokens, E joint embedding, L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.corpus import Corpus
from ..data.features import check_images, load_features, read_all
from ..data.sources import Example
from ..data.streams import batch_indices
from ..data.text import banned_ids, build_tokenizer, load_tokenizer, pad
from ..models.alignment import AlignmentModel, PretrainedClip, contrastive_loss, ranks
from ..models.saved import FILES, Eyes, build_alignment, load_eyes, save_eyes
from ..models.vision import PatchEncoder, PretrainedVision, build_vision, to_pixels
from ..utils.config import settings_of
from ..utils.seeding import generator, seed_of
from .engine import Row
from .run import Run

FEW_IMAGES = 20
"""Validation images fewer than these choose the weights by mean reciprocal rank: among ten, all are among the first ten."""
PCA_IMAGES = 1000
"""Training images that the projection of a frozen backbone is fitted on."""


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Float[Tensor, "B ..."]) -> Float[Tensor, "C ..."]:
    """The rows of all processes, with gradient, so that negatives come from the whole batch."""
    return cast(Tensor, _Gather.apply(x.contiguous())) if dist.is_initialized() else x


class AlignmentTrainee(nn.Module):
    """Alignment towers, below them the image encoder if it is trained too, and the late interaction that helps both to learn.

    Late interaction (FILIP, Yao et al. 2022) compares every word with every image token. It gives the gradient that teaches single tokens
    colours and shapes long before the pooled vectors can be told apart; it is dropped after training.
    """

    def __init__(self, alignment: AlignmentModel, vision: PatchEncoder | None, image_width: int, late_interaction: bool = True) -> None:
        super().__init__()
        self.alignment, self.vision, self.late_interaction = alignment, vision, late_interaction
        width = alignment.wte.weight.shape[1]
        self.word_out, self.patch_out = nn.Linear(width, width // 2), nn.Linear(image_width, width // 2)
        self.late_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, ids: Int[Tensor, "B L"], length: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """(global loss, late-interaction loss or 0) of this process's rows against the columns of all."""
        tokens = self.vision(image) if self.vision else image
        words, valid = self.alignment.read_ids(ids, length)
        i, t = self.alignment.embed_images(tokens), self.alignment.pool(words, valid)
        rank = dist.get_rank() if dist.is_initialized() else 0
        target = torch.arange(len(ids), device=ids.device) + rank * len(ids)
        by_image = contrastive_loss(self.alignment.logits(i, gather(t)), target)
        by_text = contrastive_loss(self.alignment.logits(t, gather(i)), target)
        if not self.late_interaction:
            return (by_image + by_text) / 2, by_text.new_zeros(())
        patches = F.normalize(self.patch_out(self.alignment.image_in(tokens)), dim=-1)
        spoken = F.normalize(self.word_out(words), dim=-1) * valid[..., None] / valid.sum(1).sqrt()[:, None, None]
        text_rows = self.late(spoken, gather(patches))
        image_rows = self.late(gather(spoken), patches).T if dist.is_initialized() else text_rows.T
        return (by_image + by_text) / 2, (contrastive_loss(text_rows, target) + contrastive_loss(image_rows, target)) / 2

    def late(self, words: Float[Tensor, "B L E"], patches: Float[Tensor, "N P E"]) -> Float[Tensor, "B N"]:
        """Sum over words of the best-matching image token."""
        row, place = words.any(-1).nonzero(as_tuple=True)  # padding is zero, and would take as long as words
        best = (words[row, place] @ patches.flatten(0, 1).T).view(-1, *patches.shape[:2]).amax(-1)
        return best.new_zeros(len(words), len(patches)).index_add(0, row, best) * self.late_scale.exp()


@dataclass(frozen=True)
class AlignmentBatch:
    image: Tensor
    """Pixels for a trained encoder, else the tokens of the frozen one."""
    ids: Int[Tensor, "B L"]
    length: Int[Tensor, " B"]


def objective(model: nn.Module, batch: AlignmentBatch) -> tuple[Tensor, dict[str, Tensor]]:
    whole, late = model(batch.image, batch.ids, batch.length)
    return whole + late, {"contrastive": whole, "late": late}


def retrieval(trainee: AlignmentTrainee, images: Callable[[slice], Tensor], captions: list[str], chunk: int = 200) -> dict[str, float]:
    """Recall of images by texts and of texts by images among the given pairs, and the mean of 1 / rank of the former."""
    parts = [slice(i, i + chunk) for i in range(0, len(captions), chunk)]
    encode: Any = trainee.vision if trainee.vision else (lambda x: x)
    i = torch.cat([trainee.alignment.embed_images(encode(images(part))) for part in parts])
    logits = i @ trainee.alignment.embed_texts(captions).T
    own = torch.arange(len(captions), device=logits.device)
    found = {"image_to_text": ranks(logits, own), "text_to_image": ranks(logits.T, own)}
    recalls = {f"{way}_r{k}": float((rank < k).float().mean()) for way, rank in found.items() for k in (1, 10)}
    return recalls | {"text_to_image_mrr": float((1 / (1 + found["text_to_image"])).mean())}


def shuffled_ids(captions: list[list[list[int]]], rows: list[int], generator: torch.Generator) -> list[list[int]]:
    """One caption at random of each of the rows."""
    draws = torch.rand(len(rows), generator=generator).tolist()
    return [captions[row][int(u * len(captions[row]))] for row, u in zip(rows, draws, strict=True)]


def as_tensor(array: np.ndarray) -> Float[Tensor, "B ..."]:
    return torch.from_numpy(array.astype(np.float32))


def train_alignment(run: Run, examples: dict[str, list[Example]]) -> Eyes:
    """The frozen eyes of all later stages, saved as alignment_model.pt; pretrained parts are taken as they are."""
    config, path = run.config, run.config.models / FILES["alignment"]
    check_images([example for some in examples.values() for example in some])
    texts = [caption for example in examples["train"] for caption in example.captions]
    name = config.base.backbone or config.data.tokenizer
    tokenizer = build_tokenizer(texts, config.data.min_count) if name == "words" else load_tokenizer(name)
    torch.manual_seed(seed_of(config.seed, "alignment"))
    vision = build_vision(config.vision)
    if isinstance(vision, PretrainedVision):
        vision.to(run.device)
        chosen = batch_indices(len(examples["train"]), min(PCA_IMAGES, len(examples["train"])), 0, config.seed, "pca")
        vision.fit_pca(read_all([examples["train"][i] for i in chosen]))
    alignment = build_alignment(config, tokenizer, vision.width)
    eyes = Eyes(config, tokenizer, banned_ids(tokenizer), vision, alignment)
    if isinstance(alignment, PretrainedClip):
        if run.main:
            save_eyes(path, eyes, {"note": f"alignment is {config.alignment.pretrained}, not trained here"})
    else:
        fit_alignment(run, eyes, alignment, examples, path)
    run.accelerator.wait_for_everyone()
    return load_eyes(path)


def fit_alignment(run: Run, eyes: Eyes, alignment: AlignmentModel, examples: dict[str, list[Example]], path: Path) -> None:
    cfg, trained = run.config.alignment.fit, eyes.vision if isinstance(eyes.vision, PatchEncoder) else None
    data = {split: alignment_inputs(run, eyes, examples[split]) for split in ("train", "val")}
    captions = Corpus(examples["train"], data["train"], torch.empty(0, 0), eyes.tokenizer, run.config.data.max_words).captions
    trainee = AlignmentTrainee(alignment, trained, eyes.vision.width, run.config.alignment.late_interaction)
    state = run.state("alignment", trainee, cfg)

    def make(index: int, rows: list[int], part: slice) -> AlignmentBatch:
        ids = shuffled_ids(captions, rows, generator(run.config.seed, "alignment captions", index))
        padded, length = pad(ids, max(map(len, ids)))
        return AlignmentBatch(as_tensor(data["train"][rows[part]]), padded[part], length[part])

    def evaluate(model: nn.Module) -> dict[str, float]:
        texts = [example.captions[0] for example in examples["val"]]
        return retrieval(cast(AlignmentTrainee, model), lambda part: as_tensor(data["val"][part]).to(run.device), texts)

    def best(model: nn.Module, row: Row) -> None:
        save_eyes(path, eyes, {"row": row})

    few = len(examples["val"]) < FEW_IMAGES
    run.fit(
        "alignment", state, cfg, len(captions), run.batches("alignment", cfg, len(captions), make), objective, evaluate=evaluate,
        better=(f"val_text_to_image_{'mrr' if few else 'r10'}", "max"), best=best, held=settings_of(run.config, "alignment", "vision"),
    )  # fmt: skip


def alignment_inputs(run: Run, eyes: Eyes, examples: list[Example]) -> np.ndarray:
    """What the trainee reads: pixels if the image encoder is trained along, else its cached tokens."""
    if isinstance(eyes.vision, PatchEncoder):
        return np.concatenate([to_pixels([image], eyes.vision.image_size).numpy() for image in read_all(examples)]).astype(np.float16)
    return load_features(examples, eyes.vision.encode, eyes.vision.fingerprint(), run.cache)
