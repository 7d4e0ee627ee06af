"""`configs/conceptual_captions.yaml` from end to end, offline: miniatures of its two models in the hub's layout, images, comparisons."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2Model

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner
from hierarchical_diffusion_rlhf_caption_refinement.data.download import image_file
from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import Comparison
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene, write_caption
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import load_denoiser
from hierarchical_diffusion_rlhf_caption_refinement.training.state import TrainState
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import load

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "conceptual_captions.yaml"
IMAGES, VAL = 28, 22
"""Of which those from VAL on are for validation."""
END, START = "<|endoftext|>", "<|startoftext|>"


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def train_tokenizer(folder: Path, tokenizer: Tokenizer, captions: list[str], special: list[str], settings: dict[str, Any]) -> Tokenizer:
    """Byte pairs of the captions, the special tokens last; tokenizer.json, and the older vocab.json and merges.txt beside it.

    Bytes that no caption has are left out: a model as untrained as here would write them.
    """
    suffix = tokenizer.model.end_of_word_suffix or ""  # type: ignore[attr-defined]
    trainer = trainers.BpeTrainer(vocab_size=200, end_of_word_suffix=suffix, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens(special)
    plain = json.loads(tokenizer.to_str())
    plain["model"]["vocab"] |= {token: tokenizer.token_to_id(token) for token in special}
    write(folder / "tokenizer.json", plain)
    write(folder / "vocab.json", plain["model"]["vocab"])
    pairs = "".join(" ".join(pair) + "\n" for pair in plain["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + pairs, encoding="utf-8")
    write(folder / "tokenizer_config.json", settings)
    return tokenizer


def save_gpt2(folder: Path, captions: list[str]) -> int:
    """Files as in the hub's `gpt2`: names without a prefix, the causal masks among the weights. Returns the size of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    size = train_tokenizer(folder, tokenizer, captions, [END], {"model_max_length": 1024}).get_vocab_size()
    torch.manual_seed(0)
    ids = {"bos_token_id": size - 1, "eos_token_id": size - 1}
    gpt2 = GPT2Model(GPT2Config(vocab_size=size, n_positions=64, n_embd=16, n_layer=3, n_head=2, **ids))
    write(folder / "config.json", gpt2.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]})
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    save_file(gpt2.state_dict() | masks, folder / "model.safetensors", {"format": "pt"})
    return size


def save_clip(folder: Path, captions: list[str]) -> None:
    """Files as in the hub's `openai/clip-vit-base-patch32`: old names and settings."""
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {**special, "model_max_length": 12, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    train_tokenizer(folder, tokenizer, captions, [START, END], settings)
    start, end = (tokenizer.token_to_id(token) for token in (START, END))
    post = {"type": "RobertaProcessing", "sep": [END, end], "cls": [START, start], "trim_offsets": False, "add_prefix_space": False}
    write(folder / "tokenizer.json", json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | {"post_processor": post})
    write(folder / "special_tokens_map.json", special)
    side = {"do_resize": True, "size": 32, "do_center_crop": True, "crop_size": 32, "resample": 3, "do_normalize": True}
    colours = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    write(folder / "preprocessor_config.json", {"feature_extractor_type": "CLIPFeatureExtractor", **side, **colours})
    torch.manual_seed(1)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**size, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=8))
    clip.save_pretrained(folder)


def collection(folder: Path) -> None:
    """The two tables, the images as if fetched, and comparisons of a caption with another image's, of images of all splits."""
    rng, rows, compared = random.Random(0), [], []
    for i in range(IMAGES):
        scene, url = sample_scene(3, "train", i), f"https://example.org/{i}.png"
        path = image_file(folder / "table_images", url)
        path.parent.mkdir(parents=True, exist_ok=True)
        render(scene).resize((80 + i, 64)).save(path, "PNG")
        rows.append((write_caption(scene, rng), url))
        for j in range(3):
            sides = [write_caption(scene, rng), write_caption(sample_scene(4, "train", 10 * i + j), rng)]
            true = rng.randrange(2)
            for person in ("one", "two"):
                choice: Any = "ab"[true] if rng.random() < 0.9 else "tie"
                compared.append(Comparison(f"{i}-{j}-{person}", url, sides[true], sides[1 - true], choice, annotator=person))
    for name, part in {"Train_GCC-training.tsv": rows[:VAL], "Validation_GCC-1.1.0-Validation.tsv": rows[VAL:]}.items():
        (folder / "table").mkdir(exist_ok=True)
        (folder / "table" / name).write_text("".join("\t".join(row) + "\n" for row in part), encoding="utf-8")
    (folder / "comparisons.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in compared))
    captions = [caption for caption, _ in rows]
    save_gpt2(folder / "gpt2", captions)
    save_clip(folder / "clip", captions)


def miniature(folder: Path) -> list[str]:
    """The shipped file under the names of the miniature, and smaller stages."""
    names = {"data.path": "table", "data.comparisons": "comparisons.jsonl", "base.backbone": "gpt2"}
    names |= {"vision.backbone": "clip", "alignment.pretrained": "clip"}
    options = ["threads=1", *(f"{key}={folder / name}" for key, name in names.items())]
    fits = [f"{stage}.fit.{setting}" for stage in ("base", "reward", "rlhf") for setting in ("batch_size=4", "save_every=2")]
    return ["--config", str(CONFIG), *options, *fits, "base.fit.epochs=2", "reward.fit.epochs=1", "rlhf.fit.epochs=1"]


@pytest.fixture(scope="module", autouse=True)
def precision() -> Iterator[None]:
    """accelerate keeps one precision per process; this file's is not that of the other tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; afterwards the GPT-2 is not where it was."""
    folder = tmp_path_factory.mktemp("conceptual")
    collection(folder / "collection")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.train(miniature(folder / "collection")) == 0
    (folder / "collection/gpt2").rename(folder / "moved")
    return folder


def train_on(folder: Path, *more: str, stage: str = "base") -> int:
    """Another run on the eyes of the finished one, with the GPT-2 where it is now."""
    options = ["start_from=models/conceptual_captions", f"base.backbone={folder / 'moved'}", "--stage", stage]
    return cli.train([*miniature(folder / "collection"), *options, *more])


def test_the_table_of_the_specification_is_what_the_file_says() -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    fits = [config[stage]["fit"] for stage in ("base", "reward", "rlhf")]
    assert [(fit["epochs"], fit["batch_size"], fit["lr"]) for fit in fits] == [(10, 16, 1e-4), (5, 16, 1e-4), (8, 8, 1e-5)]
    assert (config["data"]["train"], config["data"]["val"], config["mixed_precision"]) == (5000, 500, "bf16")
    assert (config["shaping"]["clip_weight"], config["shaping"]["preference_weight"]) == (0.7, 0.3) and all(
        fit["patience"] == 5 for fit in fits
    )


def test_every_stage_runs(run: Path) -> None:
    results = run / "results/conceptual_captions"
    summary = json.loads((results / "training_summary.json").read_text())
    assert [len(summary["stages"][stage]) for stage in ("base", "reward", "rlhf")] == [2, 1, 2]
    assert set(summary["references"]) == {"base", "rlhf"} and summary["evaluation"]["rlhf"]["reward"]
    report = json.loads((results / "reward_report.json").read_text())
    assert sum(report["comparisons"].values()) == 6 * IMAGES and min(report["comparisons"].values()) > 0
    assert report["rater_agreement"] == 1  # who chose a side chose the same
    eyes, model = load_denoiser(run / "models/conceptual_captions/best_rlhf_model.pt", "rlhf")
    base = eyes.config.base
    assert (base.width, base.layers, base.heads, len(model.h)) == (16, 3, 2, 3) and eyes.vision.num_tokens == 18
    tokenizer = Tokenizer.from_file(str(run / "moved/tokenizer.json"))
    assert eyes.tokenizer.get_vocab() == tokenizer.get_vocab() and len(model.wte.weight) == tokenizer.get_vocab_size()
    assert eyes.banned == (tokenizer.token_to_id(END),)


def test_an_image_is_captioned_without_the_backbone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    render(sample_scene(5, "test", 0)).resize((90, 64)).save("new.jpg")
    Path("list.txt").write_text("new.jpg\n")
    checkpoint = run / "models/conceptual_captions/best_rlhf_model.pt"
    assert cli.predict(["--checkpoint", str(checkpoint), "--image-list", "list.txt", "--output", "found.json"]) == 0
    (row,) = json.loads(Path("found.json").read_text())
    assert row["caption"] and row["error"] is None and isinstance(row["reward"], float) and END not in row["caption"]


def test_an_exported_captioner_needs_none_of_the_models_it_came_from(run: Path, tmp_path: Path) -> None:
    checkpoint, image = run / "models/conceptual_captions/best_rlhf_model.pt", render(sample_scene(5, "test", 0)).resize((90, 64))
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]) == 0
    before = Captioner.from_pretrained(checkpoint)(image)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (run / "collection/clip").rename(run / "clip")
    try:
        after = Captioner.from_pretrained(tmp_path / "elsewhere")(image)
    finally:
        (run / "clip").rename(run / "collection/clip")
    assert after == before and str(run) not in (tmp_path / "elsewhere/config.json").read_text()


def test_adapters_resume_to_the_same_weights_and_are_merged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    lora = ["base.lora_rank=2", "base.fit.lr=1e-2"]
    assert train_on(run, "run=whole", *lora) == 0
    save, calls = TrainState.save, []

    def killed(state: TrainState, path: Path) -> None:
        save(state, path)
        calls.append(state.step)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainState, "save", killed)
        assert train_on(run, "run=killed", *lora) == 130 and 0 < calls[-1] < 10
    assert train_on(run, "run=killed", *lora, "--resume") == 0
    whole, again = (load(f"models/{name}/best_base_model.pt", "base")["model"] for name in ("whole", "killed"))
    plain = load("models/conceptual_captions/best_base_model.pt", "base")["model"]
    assert whole.keys() == plain.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    gpt2 = load_file("moved/model.safetensors")
    assert torch.equal(whole["wte.weight"], gpt2["wte.weight"])
    assert not torch.equal(whole["h.0.mlp.c_fc.weight"], gpt2["h.0.mlp.c_fc.weight"].T)


def one_line(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    *progress, error = capsys.readouterr().err.splitlines()
    assert code == 2 and error.startswith("error: ") and all(line.startswith("images fetched") for line in progress)
    return error


def test_another_vocabulary_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run)
    save_gpt2(run / "other", ["other words of other people"])
    capsys.readouterr()
    code = train_on(run, "run=other", f"base.backbone={run / 'other'}")
    assert "the alignment stage ran with another vocabulary" in one_line(code, capsys)


def test_comparisons_of_other_images_are_an_error_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    (tmp_path / "few.jsonl").write_text(json.dumps(asdict(Comparison("0", "https://example.org/other.png", "a star", "a ring", "a"))))
    capsys.readouterr()
    assert train_on(run, "run=few", f"data.comparisons={tmp_path / 'few.jsonl'}", stage="reward") == 1
    reason = "no comparison of the data set's images that would be for the reward model's own train, val, test"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {tmp_path / 'few.jsonl'}: {reason}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["data.comparisons=''"], "data.source=conceptual_captions: the reward stage needs data.ratings or data.comparisons"),
        (["data.comparisons=''", "--stage", "reward"], "needs data.ratings or data.comparisons"),
        (["data.comparisons=''", "--stage", "rlhf"], "needs data.ratings or data.comparisons"),
        (["data.comparisons=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["data.ratings=nowhere.jsonl"], "data.ratings and data.comparisons: the reward learns from one of them"),
    ],
)
def test_no_judgements_are_an_error_before_any_work(
    options: list[str], reason: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in one_line(cli.train([*miniature(run / "collection"), *options]), capsys)
    assert not Path("models").exists() and not Path("cache").exists()
