from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data import features
from hierarchical_diffusion_rlhf_caption_refinement.data.features import FeatureError, check_images, load_features, read_all
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example

SCENES = [Example(f"train/{i}", ("x",), scene=sample_scene(0, "train", i)) for i in range(10)]


def colours(images: list[Image.Image]) -> Tensor:
    """The first two pixels of the third row, (B, 2, 3)."""
    return torch.stack([torch.tensor(np.asarray(image)[2, :2] / 255) for image in images])


class Encoder:
    """Counts the images it sees and dies after some calls."""

    def __init__(self, calls: int = 1000) -> None:
        self.calls, self.seen = calls, 0

    def __call__(self, images: list[Image.Image]) -> Tensor:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.seen += len(images)
        return colours(images)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 4)


def test_features_are_computed_once_and_keyed_by_content(tmp_path: Path) -> None:
    encoder, progress = Encoder(), []
    first = load_features(SCENES, encoder, "v1", tmp_path, lambda done, total: progress.append((done, total)))
    assert first.shape == (10, 2, 3) and first.dtype == np.float16 and isinstance(first, np.memmap)
    np.testing.assert_allclose(first, colours([e.image() for e in SCENES]).numpy(), atol=1e-3)
    assert progress == [(0, 10), (4, 10), (8, 10), (10, 10)]
    renamed = [Example(f"other/{e.key}", ("y",), scene=e.scene) for e in SCENES]
    np.testing.assert_array_equal(load_features(renamed, encoder, "v1", tmp_path), first)
    assert encoder.seen == 10
    load_features(SCENES, encoder, "v2", tmp_path)
    load_features(SCENES[::-1], encoder, "v1", tmp_path)
    assert encoder.seen == 30


@pytest.mark.parametrize("torn", [0, 5])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, torn: int) -> None:
    whole = np.array(load_features(SCENES, Encoder(), "v1", tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        load_features(SCENES, Encoder(calls=2), "v1", tmp_path)
    partial = next(tmp_path.glob("*.partial"))
    with partial.open("ab") as file:
        file.write(b"x" * torn)  # half a row
    encoder = Encoder()
    np.testing.assert_array_equal(load_features(SCENES, encoder, "v1", tmp_path), whole)
    assert encoder.seen == 2 and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("left", [b"", b"\x93NUM", b"rubbish" * 50])
def test_a_torn_header_starts_over(tmp_path: Path, left: bytes) -> None:
    whole = np.array(load_features(SCENES, Encoder(), "v1", tmp_path / "whole"))
    (tmp_path / features.cache_name(SCENES, "v1")).with_suffix(".partial").write_bytes(left)
    np.testing.assert_array_equal(load_features(SCENES, Encoder(), "v1", tmp_path), whole)


def test_of_two_runs_at_once_one_computes(tmp_path: Path) -> None:
    encoders = [Encoder(), Encoder()]
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda encoder: np.array(load_features(SCENES, encoder, "v1", tmp_path)), encoders)
    assert sorted(encoder.seen for encoder in encoders) == [0, 10]
    np.testing.assert_array_equal(one, two)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(path)
    paths[1].write_bytes(b"text")
    paths[5].unlink()
    examples = [Example(p.name, ("x",), p) for p in paths]
    with pytest.raises(FeatureError, match=r"^2 of 6 images cannot be read: .*1\.png: not an image; .*5\.png: no such file$"):
        load_features(examples, Encoder(), "v1", tmp_path / "cache")
    good = [e for i, e in enumerate(examples) if i not in (1, 5)]
    assert load_features(good, Encoder(), "v1", tmp_path / "cache").shape == (4, 2, 3)


def test_all_unreadable_images_are_named_before_long_work(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(24)]
    for path in paths:
        Image.new("RGB", (64, 64), "red").save(path)
    examples = [*SCENES, *(Example(p.name, ("x",), p) for p in paths), Example("tar/x", ("x",), read=paths[0].read_bytes)]
    check_images(examples)
    paths[0].write_bytes(paths[1].read_bytes()[:-60])  # begins as an image
    check_images(examples[:-1])
    encoder = Encoder()
    with pytest.raises(FeatureError, match=r"^1 of 34 images cannot be read: .*0\.png: "):
        load_features(examples[:-1], encoder, "v1", tmp_path / "cache")
    assert encoder.seen == 8  # the rest is only looked through
    for path in paths[1:22]:
        path.write_bytes(b"<html>")
    expected = "; ".join(f"{path}: not an image" for path in paths[1:20])
    with pytest.raises(FeatureError) as error:
        check_images(examples[:-1])
    assert str(error.value).startswith(f"22 of 34 images cannot be read: {paths[0]}: ") and str(error.value).endswith(
        f"; {expected} and 2 more"
    )
    paths[2].unlink()
    with pytest.raises(FeatureError, match=rf"^1 of 2 images cannot be read: {paths[2]}: no such file$"):
        check_images([examples[0], examples[12]])


def test_images_are_read_up_to_the_first_that_cannot_be(tmp_path: Path) -> None:
    examples = [*SCENES[:3], Example("none", ("x",), tmp_path / "none.png"), SCENES[3]]
    images = read_all(examples, start=1)
    assert [np.array_equal(next(images), e.image()) for e in SCENES[1:3]] == [True, True]
    with pytest.raises(FeatureError, match=r"^1 of 5 images cannot be read: .*none\.png: no such file$"):
        next(images)


def test_images_count_by_their_bytes_wherever_these_are(tmp_path: Path) -> None:
    def torn() -> bytes:
        raise OSError("no image in this row")

    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    inside = Example("tar/a", ("x",), read=path.read_bytes)
    assert features.cache_name([inside], "v1") == features.cache_name([Example("a", ("y",), path)], "v1")
    assert load_features([inside], Encoder(), "v1", tmp_path / "cache")[0, 0].tolist() == [1, 0, 0]
    with pytest.raises(FeatureError, match=r"^1 of 2 images cannot be read: row/1: no image in this row$"):
        load_features([inside, Example("row/1", ("x",), read=torn)], Encoder(), "v1", tmp_path / "cache")


def test_unusable_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="train/0 to train/3 are not finite"):
        load_features(SCENES, lambda images: colours(images) * torch.inf, "v1", tmp_path)
    with pytest.raises(FeatureError, match="no images"):
        load_features([], Encoder(), "v1", tmp_path)
