"""Diffusers' schedulers and ours denoise alike."""

import warnings

import pytest
import torch
from transformers import AutoModel

from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import reveal_counts

with warnings.catch_warnings(action="ignore"):
    diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")
    if not hasattr(diffusers, "BlockRefinementScheduler"):
        pytest.skip("this Diffusers has no BlockRefinementScheduler", allow_module_level=True)
    from hierarchical_diffusion_rlhf_caption_refinement.adapters.diffusers import CaptionPipeline, RevealScheduler, denoise


@pytest.fixture(scope="module")
def captioner(smoke):
    return Captioner.from_pretrained(smoke / "models/smoke")


@pytest.fixture(scope="module")
def scenes():
    return [render(sample_scene(9, "test", i)) for i in range(12)]


def ours(captioner, scenes, **settings) -> list[str]:
    return [caption.text for caption in captioner(scenes, order="confidence", **settings)]


@pytest.mark.parametrize("threshold", [1.0, 0.3])
@pytest.mark.parametrize("steps", [1, 20])
def test_its_scheduler_writes_our_captions(captioner, scenes, steps, threshold):
    """With all words at once, and with one word per step, its even schedule is our linear one."""
    found = denoise(captioner, scenes, diffusers.BlockRefinementScheduler(threshold=threshold), steps)
    assert found == ours(captioner, scenes, steps=steps, threshold=threshold if threshold < 1 else 0.0)
    assert len(set(found)) > 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "log_linear", "shifted"])
def test_our_schedules_as_its_scheduler(captioner, scenes, schedule):
    found = denoise(captioner, scenes, RevealScheduler(schedule), 4)
    assert found == ours(captioner, scenes, steps=4, schedule=schedule)


def test_pictures_of_any_mode_are_captioned(captioner, scenes):
    clear = [scene.convert("RGBA") for scene in scenes[:3]]
    assert denoise(captioner, clear, RevealScheduler("linear"), 4) == ours(captioner, scenes[:3], steps=4)


def test_its_sampling_options_reach_the_step(captioner, scenes):
    hot = [denoise(captioner, scenes, RevealScheduler("linear"), 4, temperature=3.0, generator=torch.manual_seed(i)) for i in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]


def test_a_pipeline_that_is_saved_writes_the_same_captions(captioner, scenes, tmp_path):
    captioner.save_pretrained(tmp_path / "shared")
    pipe = CaptionPipeline(AutoModel.from_pretrained(tmp_path / "shared"), RevealScheduler("cosine"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(scenes, num_inference_steps=4).captions == ours(captioner, scenes, steps=4, schedule="cosine")
    pipe.save_pretrained(tmp_path / "pipe")
    back = CaptionPipeline.from_pretrained(tmp_path / "pipe")
    back.set_progress_bar_config(disable=True)
    assert back.scheduler.config["schedule"] == "cosine" and Captioner.from_pretrained(tmp_path / "pipe/captioner").reward
    assert back(scenes[0], num_inference_steps=2).captions == pipe(scenes[:1], num_inference_steps=2).captions
    back.scheduler = diffusers.BlockRefinementScheduler(threshold=1.0)
    assert back(scenes, num_inference_steps=20).captions == ours(captioner, scenes, steps=20)


def test_our_schedule_drives_its_pipeline():
    """LLaDA2's pipeline, a toy for a model: each step reveals what the schedule says."""

    class Toy(torch.nn.Module):
        config, device, dtype = None, torch.device("cpu"), torch.float32

        def forward(self, ids, **_):
            return type("Out", (), {"logits": torch.linspace(0, 3, ids.shape[1])[None, :, None] * torch.eye(7)[ids * 0 + 3]})

    shown: list[int] = []

    def note(pipe, step, timestep, inside):
        shown.append(int((inside["block_x"] == 6).sum()))
        return {}

    pipe = diffusers.LLaDA2Pipeline(Toy(), RevealScheduler("cosine"), tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    asked = {"input_ids": torch.empty(1, 0, dtype=torch.long), "gen_length": 9, "block_length": 9, "num_inference_steps": 4}
    pipe(**asked, mask_token_id=6, threshold=2.0, editing_threshold=None, output_type="seq", callback_on_step_end=note)
    counts = reveal_counts(torch.tensor([9]), torch.tensor([4]), "cosine")[0]
    assert shown[:4] == (9 - counts.cumsum(0)).tolist()
