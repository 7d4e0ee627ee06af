"""The library face: paths or pictures in, captions out."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hierarchical_diffusion_rlhf_caption_refinement.captioner import Caption, Captioner, ObedienceError, Wishes, content_key
from hierarchical_diffusion_rlhf_caption_refinement.data.images import ImageError, load_image, prepared
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.data.text import encode, said
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import layouts
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import build_denoiser
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import CheckpointError
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError, SamplerConfig


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


@pytest.mark.parametrize("kind", ["L", "LA", "I;16", "P", "RGBA", "CMYK", "rotated", "large"])
def test_a_picture_is_seen_as_its_file_is(captioner, scenes, tmp_path, kind):
    """Upright, over white, RGB and of bounded size; the picture itself stays as it is."""
    path = tmp_path / ("0.tif" if kind in ("I;16", "CMYK") else "0.png")
    if kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        scenes[0].crop((0, 0, 64, 40)).save(path, exif=exif)
    elif kind == "large":
        scenes[0].resize((5000, 40)).save(path)
    elif kind == "RGBA":
        clear = scenes[0].convert("RGBA")
        clear.putalpha(Image.linear_gradient("L").resize((64, 64)))
        clear.save(path)
    elif kind == "I;16":
        scenes[0].convert("L").point(lambda v: v * 256, "I").convert("I;16").save(path)
    else:
        scenes[0].convert(kind).save(path)
    picture = Image.open(path)
    before = picture.mode, picture.size, picture.tobytes()
    mine, its = captioner.look(picture), captioner.look(path)
    assert mine.key == its.key and torch.equal(mine.tokens, its.tokens) and torch.equal(mine.joint, its.joint)
    assert prepared(picture).mode == "RGB" and prepared(picture).tobytes() == load_image(path).tobytes()
    assert prepared(load_image(path)).tobytes() == load_image(path).tobytes()  # once more changes nothing
    assert captioner(picture) == captioner(path)
    assert (picture.mode, picture.size, picture.tobytes()) == before


def test_a_picture_that_cannot_be_read_is_an_image_error(captioner, scenes, tmp_path):
    scenes[0].save(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    with Image.open(tmp_path / "0.png") as picture, pytest.raises(ImageError, match=r"^picture: "):
        captioner(picture)


def test_many_pictures_are_captioned_a_few_at_a_time(captioner, scenes, monkeypatch):
    several, sizes, write = (scenes * 14)[:67], [], captioner.write
    together = write([captioner.look(scene) for scene in several], replace(captioner.plan, temperature=1.0, steps=2), 0)
    monkeypatch.setattr(captioner, "write", lambda seen, *more: sizes.append(len(seen)) or write(seen, *more))
    found = captioner(several, temperature=1.0, steps=2)
    assert sizes == [32, 32, 3] and [(c.text, c.ids) for c in found] == [(c.text, c.ids) for c in together]


def test_the_caption_tells_how_it_came_about(captioner, scenes):
    for caption in captioner(scenes, steps=3):
        assert " ".join(t.token for t in caption.tokens) == caption.text
        assert {t.step for t in caption.tokens} <= {1, 2, 3} and all(0 < t.confidence <= 1 for t in caption.tokens)
        product = 1.0
        for token in caption.tokens:
            product *= token.confidence
        assert caption.confidence == pytest.approx(product ** (1 / len(caption.tokens)), rel=1e-4)
        assert isinstance(caption.reward, float)


def test_words_say_where_the_reward_comes_from(captioner, scenes):
    alignment = captioner.eyes.alignment
    for scene, caption in zip(scenes, captioner(scenes), strict=True):
        assert [w.word for w in caption.words] == caption.text.split() and caption.steps == max(t.step for t in caption.tokens)
        assert [(w.confidence, w.step) for w in caption.words] == [(t.confidence, t.step) for t in caption.tokens]
        assert encode(captioner.eyes.tokenizer, [caption.text]) == [list(caption.ids)]
        joint = captioner.look(scene).joint
        for i, word in enumerate(caption.words):
            if word.credit:
                rest = [w.word for j, w in enumerate(caption.words) if j != i]
                drop = [float(alignment.embed_texts([" ".join(x)])[0] @ joint[0]) for x in (caption.text.split(), rest)]
                assert word.credit == pytest.approx(drop[0] - drop[1], abs=1e-5)
        assert any(w.credit for w in caption.words) and not any(w.credit for w in caption.words if w.word in ("a", "on", "and"))
        assert set(caption.qualities) == {"accuracy", "fluency", "specificity"}


@pytest.mark.parametrize("remask", [0, 1])
def test_the_stream_uncovers_the_caption_step_by_step(captioner, scenes, remask):
    settings = {"wishes": Wishes(prefix="sks, "), "steps": 5, "remask": remask}
    *drafts, last = captioner.stream(scenes[0], **settings)
    assert last == captioner(scenes[0], **settings)[0] and len(drafts) == last.steps
    for step, draft in enumerate(drafts[:5]):
        shown = [t.token if t.step <= step else "[MASK]" for t in last.tokens]
        assert draft.text == "sks, " + " ".join(t.token for t in draft.tokens) and draft.reward is None
        assert remask or [t.token for t in draft.tokens] == shown


def test_the_stream_shows_each_draft_before_the_next_is_thought_of(captioner, scenes, monkeypatch):
    calls, advance = [], captioner.model.advance
    monkeypatch.setattr(captioner.model, "advance", lambda *args: calls.append(1) or advance(*args))
    for done, draft in enumerate(captioner.stream(scenes[0], steps=5)):
        assert len(calls) == done and sum(t.token != "[MASK]" for t in draft.tokens) >= done
    assert torch.is_grad_enabled()


def test_what_comes_at_once_is_the_streams_last_caption(captioner, scenes):
    for settings in (
        {"wishes": Wishes(must_include=("green circle",))},
        {"candidates": 3, "temperature": 0.8},
        {"beams": 2, "order": "left_to_right"},
    ):
        *drafts, last = captioner.stream(scenes[0], **settings)
        assert last == captioner(scenes[0], **settings)[0] and all("[MASK]" in draft.text for draft in drafts)
        assert bool(drafts) == ("beams" not in settings)
    every = (w for w in captioner.eyes.tokenizer.get_vocab() if w.isalpha() and w != "red")
    with pytest.raises(ObedienceError, match="no caption was found that obeys"):
        list(captioner.stream(scenes[0], wishes=Wishes(ban=(*every, "red red"), min_words=3)))


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
    for settings, line in (
        ({"stepz": 1}, "unknown key 'sampler.stepz'; did you mean 'sampler.steps'"),
        ({"order": "bogus"}, r"^sampler\.order=bogus: .*bogus"),
        ({"schedule": "bogus"}, r"^sampler\.schedule=bogus: .*bogus"),
        ({"steps": "many"}, r"^sampler\.steps=many: "),
    ):
        with pytest.raises(ConfigError, match=line):
            captioner(scenes, **settings)
        with pytest.raises(ConfigError, match=line):
            next(captioner.stream(scenes[0], **settings))
    assert captioner.planned({"temperature": 1e-7, "both_ways": False, "order": "random"}) == replace(
        captioner.plan, temperature=1e-7, order="random"
    )


def test_an_unreadable_image_is_named(captioner, tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        captioner(tmp_path / "gone.png")


def test_without_a_reward_model(smoke, scenes, tmp_path):
    shutil.copy(smoke / "models/smoke/best_base_model.pt", tmp_path)
    captioner = Captioner.from_pretrained(tmp_path, "base")
    assert [(c.reward, c.qualities) for c in captioner(scenes)] == [(None, None)] * 5
    assert all(any(w.credit for w in c.words) for c in captioner(scenes))
    with pytest.raises(ValueError, match="needs a reward model"):
        captioner(scenes, candidates=2, temperature=1.0)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"best_rlhf_model\.pt: No such file"):
        Captioner.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def speller(captioner) -> Captioner:
    """A captioner whose words have several tokens, with random weights."""
    captions = ["there is a small red circle above two large green hearts on water", "a purple triangle left of an orange star on slate"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet))
    torch.manual_seed(0)
    odd = [i for i in range(tokenizer.get_vocab_size()) if not re.fullmatch(r" ?[a-z]+", tokenizer.decode([i]))]
    eyes = replace(captioner.eyes, tokenizer=tokenizer, banned=tuple(odd))
    return Captioner(eyes, build_denoiser(eyes), None, SamplerConfig(steps=4))


def test_subword_models_obey_in_words(speller, scenes):
    def texts(**wishes) -> list[str]:
        return [c.text for c in speller(scenes, wishes=Wishes(**wishes))]

    free = texts()
    assert all(len(text.split()) < 15 for text in free) and len(encode(speller.eyes.tokenizer, ["zebra crossing"])[0]) > 4
    assert all(3 <= len(text.split()) <= 4 for text in texts(min_words=3, max_words=4))
    for caption in speller(scenes):
        assert [w.word for w in caption.words] == caption.text.split() and len(caption.ids) > len(caption.words)
        assert min(w.confidence for w in caption.words) == min(t.confidence for t in caption.tokens)
    assert [list(speller.stream(s))[-1].text for s in scenes] == free
    assert all("zebra crossing" in " ".join(said(text)) for text in texts(must_include=("zebra crossing",)))
    assert all(re.fullmatch(r"a zebra .+ on .+", text) for text in texts(template="a zebra [MASK] on [MASK]"))
    words = {word for text in free for word in said(text)}
    assert not any(words & set(said(text)) for text in texts(ban=tuple(sorted(words))))


def test_wishes_in_the_library(captioner, scenes):
    wishes = Wishes(must_include=("green circle",), max_words=5, prefix="sks ", suffix=".")
    found = captioner(scenes, wishes=wishes)
    assert all(re.fullmatch(r"sks .*\bgreen circle\b.*\.", c.text) and len(c.tokens) <= 5 for c in found)
    assert [captioner(s, wishes=wishes)[0].text for s in scenes] == [c.text for c in found]
    free = captioner(scenes)
    assert captioner(scenes[0], wishes=Wishes(must_include=(free[0].text,)))[0].text == free[0].text


def test_one_phrase_or_a_list_of_them(captioner, scenes):
    assert Wishes(ban="slate", must_include="green circle") == Wishes(ban=("slate",), must_include=("green circle",))
    assert Wishes(ban="on") == Wishes(ban=["on"]) != Wishes(ban=("o", "n"))
    (listed,) = captioner(scenes[0], wishes=Wishes(must_include=["green circle"], ban=["two"]))
    assert listed == captioner(scenes[0], wishes=Wishes(must_include="green circle", ban="two"))[0]
    assert "green circle" in listed.text and "two" not in listed.text.split()
    with pytest.raises(ConfigError, match="'' is an empty word"):
        Wishes(ban="")


def test_frames_and_layouts_by_hand():
    wishes = Wishes(template="A dog [MASK] on [MASK] [MASK].")
    assert [
        wishes.obeyed_by(t) for t in ("a dog sits on the red mat", "a dog on the mat", "a dog sits on mat", "A dog, sits on the mat")
    ] == [True, False, False, True]
    assert layouts(4, [([7], [8]), None], []) == [[7, -1, -1, -1]]
    assert sorted(layouts(4, [None, ([7], [8]), None], [])) == [[-1, -1, 8, -1], [-1, 8, -1, -1]]
    assert layouts(3, [None], [([1, 2], [3, 4])]) == [[1, 2, -1], [-1, 3, 4]]
    assert layouts(2, [None], [([1], [1]), ([2], [2])]) == [[1, 2], [2, 1]]
    assert layouts(2, [([7], [8]), None, None], []) == [] and layouts(1, [None], [([1, 2], [1, 2])]) == []
    many = layouts(60, [None, ([5], [5])] * 5, [])
    assert len(many) == 960 and all(len(row) == 60 and row.count(5) == 5 and row[-1] == 5 for row in many)
