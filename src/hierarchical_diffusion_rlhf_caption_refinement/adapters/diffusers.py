"""Diffusers: its discrete schedulers denoise with our model, our schedules drive its pipelines, one captions (extra `diffusers`)."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, cast

import torch
from PIL.Image import Image

from ..captioner import Captioner
from ..data.text import decode
from ..models.diffusion import HIDDEN, reveal_counts
from ..models.sampler import choose_length
from ..pretrained import CaptionRefiner
from ..utils.config import Schedule


@torch.no_grad()
def denoise(captioner: Captioner, images: Iterable[Image], scheduler: Any, steps: int, **options: Any) -> list[str]:
    """Captions whose tokens `scheduler` chooses, a BlockRefinementScheduler or one with its `set_timesteps` and `step`.

    The model decides the length, the caption is one block; `options` go to `step`: temperature, top_p, generator, ...
    """
    model, texts = captioner.model, []
    device, mask_id = model.mask.device, len(model.allowed)  # one past the vocabulary
    for image in images:
        memory = model.read_image(captioner.look(image).tokens)
        length, _ = choose_length(memory.length_logits, 1, torch.full((1,), 0.5, device=device), captioner.plan)
        scheduler.set_timesteps(steps, device=device, block_length=int(length))
        sample = torch.full((1, int(length)), mask_id, device=device)
        revealed = torch.full_like(sample, HIDDEN)
        for k in range(1, steps + 1):
            hidden = sample == mask_id
            states = model.streams(sample.masked_fill(hidden, 0), torch.where(hidden, k, revealed), length, memory)
            sample = scheduler.step(model.to_logits(states[-1]), k - 1, sample, mask_token_id=mask_id, **options).prev_sample
            revealed = torch.where(hidden & (sample != mask_id), k, revealed)
        texts.append(decode(captioner.eyes.tokenizer, sample[0].tolist()))
    return texts


@cache
def _classes() -> dict[str, Any]:
    from diffusers import BlockRefinementScheduler, DiffusionPipeline, SchedulerMixin  # type: ignore[attr-defined]
    from diffusers.configuration_utils import register_to_config  # type: ignore[import-not-found]
    from diffusers.utils import BaseOutput  # type: ignore[import-not-found]

    class RevealScheduler(BlockRefinementScheduler):
        """Reveals as many tokens per step as one of our schedules says; confident ones early only with a `threshold` of at most 1."""

        @register_to_config
        def __init__(self, schedule: Schedule = "linear", threshold: float = 2.0, minimal_topk: int = 1) -> None:
            super().__init__(threshold=threshold, minimal_topk=minimal_topk)

        def get_num_transfer_tokens(self, block_length: int, num_inference_steps: int) -> torch.LongTensor:
            counts = reveal_counts(torch.tensor([block_length]), torch.tensor([num_inference_steps]), self.config["schedule"])[0]
            return cast(torch.LongTensor, counts)

    class CaptionPipeline(DiffusionPipeline):
        """`CaptionPipeline(AutoModel.from_pretrained("shared"), RevealScheduler())(images).captions`; saves and loads as pipelines do."""

        def __init__(self, captioner: CaptionRefiner, scheduler: SchedulerMixin) -> None:
            super().__init__()
            self.register_modules(captioner=captioner, scheduler=scheduler)

        def __call__(self, images: Image | Sequence[Image], num_inference_steps: int = 8, **options: Any) -> BaseOutput:
            """`captions` in the images' order; `options` as of `denoise`."""
            parts = self.captioner.parts
            captioner = Captioner(parts.eyes, parts.denoiser, parts.reward, parts.eyes.config.sampler)
            several = cast(Any, self).progress_bar([images] if isinstance(images, Image) else images)
            return BaseOutput(captions=denoise(captioner, several, self.scheduler, num_inference_steps, **options))

    return {"RevealScheduler": RevealScheduler, "CaptionPipeline": CaptionPipeline, "SchedulerMixin": SchedulerMixin}


def __getattr__(name: str) -> Any:
    """The classes, made when they are asked for: the package is whole without the extra. Its loader finds its SchedulerMixin here."""
    if name in ("RevealScheduler", "CaptionPipeline", "SchedulerMixin"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
