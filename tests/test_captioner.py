"""The library face: paths or pictures in, captions out."""

import shutil

import pytest
from PIL import Image

from hierarchical_diffusion_rlhf_caption_refinement.captioner import Caption, Captioner, content_key
from hierarchical_diffusion_rlhf_caption_refinement.data.images import ImageError
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import CheckpointError
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError


@pytest.fixture(scope="module")
def captioner(smoke):
    return Captioner.from_pretrained(smoke / "models/smoke")


@pytest.fixture(scope="module")
def scenes():
    return [render(sample_scene(9, "test", i)) for i in range(5)]


def test_a_folder_or_a_file(smoke, captioner, scenes):
    by_file = Captioner.from_pretrained(smoke / "models/smoke/best_rlhf_model.pt")
    assert by_file(scenes) == captioner(scenes)
    base = Captioner.from_pretrained(str(smoke / "models/smoke"), "base")
    assert [c.text for c in base(scenes)] != [c.text for c in captioner(scenes)]


def test_one_or_several_pictures_or_paths(captioner, scenes, tmp_path):
    scenes[0].save(tmp_path / "0.png")
    (alone,) = captioner(scenes[0])
    assert isinstance(alone, Caption) and alone.text and alone.seed == 0
    assert [c.text for c in captioner([scenes[0], str(tmp_path / "0.png"), tmp_path / "0.png"])] == [alone.text] * 3
    assert captioner(tmp_path / "0.png")[0].text == alone.text
    assert captioner([]) == []


def test_the_caption_tells_how_it_came_about(captioner, scenes):
    for caption in captioner(scenes, steps=3):
        assert " ".join(t.token for t in caption.tokens) == caption.text
        assert {t.step for t in caption.tokens} <= {1, 2, 3} and all(0 < t.confidence <= 1 for t in caption.tokens)
        product = 1.0
        for token in caption.tokens:
            product *= token.confidence
        assert caption.confidence == pytest.approx(product ** (1 / len(caption.tokens)), rel=1e-4)
        assert isinstance(caption.reward, float)


def test_company_and_order_do_not_matter_and_the_seed_does(captioner, scenes):
    settings = {"temperature": 1.0, "order": "random"}
    together = captioner(scenes, **settings)
    assert [c.text for c in captioner(scenes[::-1], **settings)] == [c.text for c in together][::-1]
    assert [captioner(s, **settings)[0].text for s in scenes] == [c.text for c in together]
    assert [c.text for c in captioner(scenes, seed=1, **settings)] != [c.text for c in together]
    assert captioner.plan.temperature == 0  # settings are for one call


def test_copies_of_a_picture_share_their_noise(scenes, tmp_path):
    scenes[0].save(tmp_path / "copy.png")
    assert content_key(scenes[0]) == content_key(Image.open(tmp_path / "copy.png")) != content_key(scenes[1])


def test_settings_are_checked(captioner, scenes):
    with pytest.raises(ConfigError, match=r"sampler\.steps"):
        captioner(scenes, steps=0)
    with pytest.raises(TypeError, match="stepz"):
        captioner(scenes, stepz=1)


def test_an_unreadable_image_is_named(captioner, tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        captioner(tmp_path / "gone.png")


def test_without_a_reward_model(smoke, scenes, tmp_path):
    shutil.copy(smoke / "models/smoke/best_base_model.pt", tmp_path)
    captioner = Captioner.from_pretrained(tmp_path, "base")
    assert [c.reward for c in captioner(scenes)] == [None] * 5
    with pytest.raises(ValueError, match="needs a reward model"):
        captioner(scenes, candidates=2, temperature=1.0)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"best_rlhf_model\.pt: No such file"):
        Captioner.from_pretrained(tmp_path)
