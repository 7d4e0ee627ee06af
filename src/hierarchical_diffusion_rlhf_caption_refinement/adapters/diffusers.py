"""Diffusers: its discrete schedulers denoise with our model, and our schedules drive its pipelines (extra `diffusers`)."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from ..captioner import Captioner
from ..data.text import decode
from ..models.diffusion import HIDDEN, reveal_counts
from ..models.sampler import choose_length
from ..utils.config import Schedule


@torch.no_grad()
def denoise(captioner: Captioner, images: Sequence[Image], scheduler: Any, steps: int, **options: Any) -> list[str]:
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


def reveal_scheduler(schedule: Schedule, **settings: Any) -> Any:
    """A BlockRefinementScheduler that reveals as many tokens per step as `schedule` says; `settings` are its own.

    Confident tokens are revealed early only with a `threshold` of at most 1.
    """
    from diffusers import BlockRefinementScheduler  # type: ignore[attr-defined]

    class RevealScheduler(BlockRefinementScheduler):
        def get_num_transfer_tokens(self, block_length: int, num_inference_steps: int) -> torch.Tensor:
            return reveal_counts(torch.tensor([block_length]), torch.tensor([num_inference_steps]), schedule)[0]

    return RevealScheduler(**{"threshold": 2.0} | settings)
