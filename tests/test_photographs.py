"""The whole way with image files, people's captions, people's ratings and a pretrained backbone, all of them tiny."""

import json
import random
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, CLIPImageProcessorPil, ViTConfig, ViTModel

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner, Wishes
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene, write_caption
from hierarchical_diffusion_rlhf_caption_refinement.evaluation import java_metrics
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ["train"] * 10 + ["val"] * 4 + ["test"] * 10


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def collection(folder: Path, rated: int) -> None:
    """`captions.jsonl`, `images/`, `ratings.jsonl` of the first `rated` test images, `backbone/` and `photographs.yaml`."""
    rng, rows, ratings = random.Random(0), [], []
    (folder / "images").mkdir(parents=True)
    for i, split in enumerate(SPLITS):
        scene, name = sample_scene(3, "train", i), f"{i}.{'jpg' if i % 2 else 'png'}"
        render(scene).resize((80 + i, 64)).save(folder / "images" / name)
        captions = [write_caption(scene, rng) for _ in range(3)]
        rows.append({"image": name, "captions": captions, "split": split})
        if split == "test" and len({r["image"] for r in ratings}) < rated:
            others = [write_caption(sample_scene(4, "train", 10 * i + j), rng) for j in range(2)]
            for base, caption in [(3, write_caption(scene, rng)), (2, others[0]), (1, others[1])]:
                votes = [min(max(base + rng.choice([-1, 0, 0, 1]), 1), 4) for _ in range(3)]
                ratings.append({"image": name, "caption": caption, "ratings": votes, "scale": [1, 4], "source": "expert"})
    write_lines(folder / "captions.jsonl", rows)
    write_lines(folder / "ratings.jsonl", ratings)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**shape, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(folder / "backbone")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder / "backbone")
    config = yaml.safe_load((ROOT / "configs/smoke.yaml").read_text(encoding="utf-8"))
    names = {"path": "captions.jsonl", "ratings": "ratings.jsonl"}
    config["data"] = {"source": "jsonl", "train": 0, "val": 0, "test": 0, "max_words": 12} | {k: str(folder / v) for k, v in names.items()}
    config["vision"] = {"backbone": str(folder / "backbone"), "width": 16}
    config["reward"] |= {"comparisons": 0, "curve": [5, 300], "repeats": 0.5}
    config["base"] |= {"mirror": True, "crops": 1, "patch_dropout": 0.5, "open_end": 0.6}
    config["sampler"] = {"steps": 12, "order": "open_end"}
    config["rlhf"] |= {"steps": 12, "order": "open_end"}
    config["shaping"] = {"dense": "leave_one_word_out"}
    for stage in ("alignment", "base", "reward", "rlhf"):
        config[stage]["fit"] |= {"epochs": 1, "batch_size": 5}
    config["rlhf"]["fit"] |= {"epoch_size": 10}
    (folder / "photographs.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; the collection lies in `collection/`."""
    folder = tmp_path_factory.mktemp("photographs")
    collection(folder / "collection", 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.train(["--config", str(folder / "collection/photographs.yaml")]) == 0
    return folder


def test_quality_is_told_by_references(photographs):
    summary = json.loads((photographs / "results/photographs/training_summary.json").read_text())
    assert "gold" not in summary and summary.get("win_rate") is None
    for kind in ("base", "rlhf"):
        found = summary["references"][kind]
        assert set(found) == {*(f"bleu_{n}" for n in range(1, 5)), "cider_d", "rouge_l", "specificity"}
        assert all(v >= 0 for v in found.values())
        assert summary["evaluation"][kind]["references"] == found and "reward" in summary["evaluation"][kind]
    assert 0 < summary["references"]["base"]["rouge_l"] < 1
    assert summary["alignment"]["val_text_to_image_r10"] == 1.0  # among four
    assert [row["epoch"] for row in summary["stages"]["rlhf"]] == [0, 1] and "val_cider_d" in summary["stages"]["base"][0]
    assert (photographs / "results/photographs/report/report.html").read_text(encoding="utf-8").count("<img") > 12


def test_the_reward_model_learns_from_ratings(photographs):
    report = json.loads((photographs / "results/photographs/reward_report.json").read_text())
    counts = report["comparisons"]
    assert min(counts.values()) > 0 and sum(counts.values()) <= 45 and "facts" not in report
    assert 0.5 < report["rater_agreement"] <= 1 and 0 <= report["accuracy"]["value"] <= 1
    assert 0 <= report["repetition"]["value"] <= 1 and set(report["by_source"]) == {"expert"}
    assert list(report["curve"]) == sorted({"5", str(counts["train"])}, key=int)


def test_a_second_round(photographs, monkeypatch):
    monkeypatch.chdir(photographs)
    again = ["--stage", "rlhf", "run=again", "start_from=models/photographs", "rlhf.start=models/photographs/best_rlhf_model.pt"]
    assert cli.train(["--config", str(photographs / "collection/photographs.yaml"), *again]) == 0


def test_evaluate_and_compare(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(photographs)
    told = {"meteor": 0.25}  # Java takes ten seconds to start; tests/evaluation/test_metrics.py runs it
    monkeypatch.setattr(java_metrics, "java_scores", lambda captions, references: told)
    names = [f"models/photographs/best_{kind}_model.pt" for kind in ("rlhf", "base")]
    assert cli.evaluate(["--checkpoint", names[0], "--compare", names[1], "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    summary = json.loads((photographs / "results/photographs/training_summary.json").read_text())
    for kind in ("base", "rlhf"):
        assert found["references"][kind] == summary["references"][kind] | told
    assert found["win_rate"] is None
    assert list(found["captions"]) == [f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(14, 24)]
    assert "cider" in capsys.readouterr().out


def test_a_photograph_is_captioned(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = photographs / "collection/images/15.jpg"
    checkpoint = photographs / "models/photographs/best_rlhf_model.pt"
    Path("list.txt").write_text(f"{image}\n")
    assert cli.predict(["--checkpoint", str(checkpoint), "--image-list", "list.txt", "--output", "found.json"]) == 0
    (row,) = json.loads(Path("found.json").read_text())
    assert row["caption"] and row["error"] is None and isinstance(row["reward"], float)
    assert row["tokens"] and set(row["caption"].split()) == {token["token"] for token in row["tokens"]}


def test_captions_with_an_open_end_obey_and_stream(photographs):
    captioner = Captioner.from_pretrained(photographs / "models/photographs")
    image = photographs / "collection/images/15.jpg"
    for low, high in ((1, 2), (5, 6), (12, 12)):
        assert low <= len(captioner(image, min_words=low, max_words=high)[0].tokens) <= high
    assert captioner(image, wishes=Wishes(template="there is [MASK]"))[0].text.startswith("there is ")
    assert "red" in captioner(image, wishes=Wishes(must_include=("red",)))[0].text.split()
    assert captioner(image, order="spread", steps=3)[0].steps <= 3
    said = captioner(image, beams=4, both_ways=True, clip=1.0)[0].text
    assert said and all(word in captioner.eyes.tokenizer.get_vocab() for word in said.split())
    *drafts, last = captioner.stream(image, seed=1, temperature=1.0)
    assert last == captioner(image, seed=1, temperature=1.0)[0] and len(drafts) in (last.steps, last.steps + 1)
    for t, draft in enumerate(drafts[: last.steps]):
        assert draft.text == " ".join([*(token.token for token in last.tokens[:t]), "[MASK]"])
    with pytest.raises(ConfigError, match="order=open_end takes one for each of up to 12 tokens"):
        captioner(image, steps=4)


def test_the_networks_move_together(photographs, tmp_path):
    assert cli.main(["export", "--checkpoint", str(photographs / "models/photographs/best_rlhf_model.pt"), "--output", str(tmp_path)]) == 0
    eyes = AutoModel.from_pretrained(tmp_path).to("meta").parts.eyes
    assert eyes.vision.device.type == "meta" and all(t.is_meta for t in (*eyes.vision.state_dict().values(), *eyes.alignment.parameters()))


def test_loading_a_backbone_is_silent(photographs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # a caption's words in one line, however many
    checkpoint = photographs / "models/photographs/best_rlhf_model.pt"
    assert cli.predict(["--checkpoint", str(checkpoint), "--image-url", str(photographs / "collection/images/0.png")]) == 0
    found = capfd.readouterr()
    assert found.err == "" and len(found.out.splitlines()) == 3


@pytest.mark.slow
def test_the_autoregressive_peer_is_refined_by_self_critical_training(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(photographs)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    config, weights, found = (
        ["--config", str(photographs / "collection/photographs.yaml")],
        str(tmp_path / "ar.pt"),
        tmp_path / "found.json",
    )

    def bench(name: str, *arguments: str) -> None:
        monkeypatch.setattr("sys.argv", [name, *config, *arguments, "--output", str(found)])
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")

    bench("peers.py", "--peer", "autoregressive", "--minutes", "0.02", "--save", weights)
    start = json.loads(found.read_text())["test"]["greedy"]
    bench("self_critical.py", "--start", weights, "rlhf.sparse=references", "rlhf.fit.epochs=3", "rlhf.fit.lr=0.02")
    told = json.loads(found.read_text())
    assert told["test"]["base"]["greedy"] == start
    assert told["curve"][-1]["cider_d"] != told["curve"][0]["cider_d"]
    assert [row["step"] for row in told["curve"]] == [0, 2, 4, 6] and told["queries"] == 6 * 5 * 4  # updates, images, captions of each
    bench("self_critical.py", "--start", weights, "rlhf.sparse=references", "rlhf.fit.lr=1e-30")  # too little to change anything
    assert json.loads(found.read_text())["test"] == {"base": told["test"]["base"], "refined": told["test"]["base"]}


def test_a_judge_that_had_no_part_in_the_training(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(photographs)
    judge = runpy.run_path(str(ROOT / "benchmarks/held_out_judge.py"))
    judge["main"].__globals__["HELD_OUT"] = 2
    config = str(photographs / "collection/photographs.yaml")
    monkeypatch.setattr("sys.argv", ["held_out_judge.py", "--config", config, "--output", str(tmp_path / "judge.json")])
    judge["main"]()
    found = json.loads((tmp_path / "judge.json").read_text())
    assert 0 < found["photographs"] < 10 and set(found["judge"]["weights"]) == set(judge["SEEN"]) and found["judge"]["comparisons"] > 0
    refined, base = (f"models/photographs/best_{kind}_model.pt" for kind in ("rlhf", "base"))
    one = found["refined"][refined]
    report = json.loads(Path("results/photographs/reward_report.json").read_text())
    assert found["against"]["model"] == base and found["judge"]["comparisons"] == report["comparisons"]["test"]  # people's alone
    assert 0 <= one["win_rate"]["low"] <= one["win_rate"]["value"] <= one["win_rate"]["high"] <= 1
    summary = json.loads(Path("results/photographs/training_summary.json").read_text())
    for kind, row in (("base", found["against"]), ("rlhf", one)):
        assert row["references"]["cider_d"]["value"] == pytest.approx(summary["references"][kind]["cider_d"], abs=1e-6)
    assert f"prefers {refined} to {base} on {one['win_rate']['value']:.1%} of {found['photographs']} photographs" in capsys.readouterr().out
    both = ["--refined", base, "--refined", refined, "--against", refined, "--base", "sampler.max_words=1"]
    monkeypatch.setattr("sys.argv", [*sys.argv, *both, "seed=5"])  # of RLHF: the judge stays who it is
    judge["main"]()
    other = json.loads((tmp_path / "judge.json").read_text())
    assert other["judge"] == found["judge"] and other["photographs"] == found["photographs"]
    assert other["against"]["mean_words"] == 1 and other["refined"].keys() == {base, refined}


@pytest.mark.parametrize("rated", [0, 1])
def test_too_few_ratings_are_an_error_in_one_line(photographs, tmp_path, monkeypatch, capsys, rated):
    collection(tmp_path / "few", rated)
    capsys.readouterr()
    monkeypatch.chdir(photographs)
    ratings = tmp_path / "few/ratings.jsonl"
    config, source = photographs / "collection/photographs.yaml", "start_from=models/photographs"
    code = cli.train(["--config", str(config), "run=few", source, "--stage", "reward", f"data.ratings={ratings}"])
    found = capsys.readouterr().err
    assert code == 1 and found.startswith(f"error: {ratings}: ") and found.count("\n") == 1


def test_references_as_reward_need_nobodys_ratings(photographs, tmp_path, monkeypatch):
    for name in ("alignment_model.pt", "best_base_model.pt"):
        (tmp_path / "trained").mkdir(exist_ok=True)
        shutil.copy(photographs / "models/photographs" / name, tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    config, settings = photographs / "collection/photographs.yaml", ["data.ratings=''", "rlhf.sparse=references", "start_from=trained"]
    assert cli.train(["--config", str(config), "--stage", "rlhf", *settings]) == 0
    summary = json.loads(Path("results/photographs/training_summary.json").read_text())
    rows = summary["stages"]["rlhf"]
    assert [row["epoch"] for row in rows] == [0, 1] and all(row["val_reward"] <= row["val_judge"] <= 10 for row in rows)
    assert 0 < rows[1]["alpha"] < 1 and "reward" not in summary["evaluation"]["rlhf"]


def test_every_rated_photograph_is_judged_by_a_head_that_has_not_seen_it(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(photographs)
    out, config = tmp_path / "folds.json", photographs / "collection/photographs.yaml"
    monkeypatch.setattr("sys.argv", ["reward_folds.py", "--config", str(config), "--output", str(out), "--even", "0", "--even", "1"])
    folds = runpy.run_path(str(ROOT / "benchmarks/reward_folds.py"), run_name="__main__")
    found = json.loads(out.read_text())
    rows = found["accuracy by reward.even_sources"]
    assert list(rows) == ["0.0", "1.0"] and all(set(row) == {"expert"} for row in rows.values())  # of pairs made nobody was asked
    assert all(0 <= row["expert"]["low"] <= row["expert"]["value"] <= row["expert"]["high"] <= 1 for row in rows.values())
    assert found["photographs"] > folds["FOLDS"] and "reward.even_sources=1.0: expert" in capsys.readouterr().out
