import base64
import copy
import io
import math
import random
import re
from html import unescape

import pytest
from PIL import Image

from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import check, describe, render, sample_scene, write_caption
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.report import Sample, WordDetail, write_report


def interval(value: float, half: float = 0.03) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def made_up_rows(epochs: int = 8) -> list[dict]:
    """Rows of all four stages as the log has them, the base model's own row of the refinement included."""
    rows: list[dict] = []
    for e in range(1, epochs + 1):
        done = e / epochs
        found = {"val_text_to_image_r1": 0.4 * done, "val_text_to_image_r10": 0.7 * done}
        rows.append({"stage": "alignment", "step": 62 * e, "epoch": e, "loss": 9 - 5 * done, **found, "seconds": 10.0 * e})
    for e in range(1, epochs + 1):
        done = 1 - math.exp(-e / 3)
        gold = {
            "val_gold_utility": 0.65 * done,
            "val_gold_accuracy": 0.8 * done,
            "val_gold_specificity": 0.5 * done,
            "val_gold_fluency": done,
        }
        rows.append(
            {"stage": "base", "step": 62 * e, "epoch": e, "loss": 4 - 2.5 * done, "nll": 3 - 2 * done, "val_loss": 3 - 1.95 * done, **gold}
        )
    for e in range(1, 5):
        rows.append(
            {
                "stage": "reward",
                "step": 15 * e,
                "epoch": e,
                "loss": 0.42,
                "accuracy": 0.7 + 0.01 * e,
                "val_loss": 0.9 - 0.01 * e,
                "val_accuracy": 0.66 + 0.005 * e,
            }
        )
    for e in range(epochs + 1):
        row: dict = {
            "stage": "rlhf",
            "step": 15 * e,
            "epoch": e,
            "val_loss": 1.0 + 0.01 * e,
            "val_kl": 0.9 * e,
            "val_entropy": 1.4 - 0.08 * e,
        }
        row |= {"val_reward": 0.7 + 0.25 * e, "val_judge": 0.6 + 0.3 * e - 0.025 * e**2, "val_repetition": 0.05, "val_bad_endings": 0.01}
        row |= {"val_gold_utility": 0.65 + 0.04 * e - 0.003 * e**2, "val_gold_accuracy": 0.8 + 0.01 * e, "val_distinct_2": 0.3}
        if e:
            shares = [math.exp(-((i - 5 - 0.3 * e) ** 2) / 4) if 0 < i < 9 else 0.0 for i in range(10)]
            row |= {f"alpha_{i / 10:.1f}": s / sum(shares) for i, s in enumerate(shares)}
            row |= {"reward": 0.25 * e, "kl": 0.8 * e, "alpha": 0.52 + 0.02 * e, "entropy": 1.5 - 0.08 * e, "grad_norm": None}
        rows.append(row)
    return rows


def made_up_summary() -> dict:
    gold = {"accuracy": 0.8364, "specificity": 0.5044, "fluency": 0.938, "utility": 0.6536, "mean_words": 9.33}
    return {
        "run": "default",
        "gold": {"data": {k: 0.9 * v for k, v in gold.items()}, "base": gold, "rlhf": gold | {"utility": 0.7812, "accuracy": 0.9031}},
        "evaluation": {"base": {"reward": interval(0.61), "repetition": 0.061}, "rlhf": {"reward": interval(2.34), "repetition": 0.048}},
        "win_rate": interval(0.736),
        "seconds": {"alignment": 95.0, "base": 347.0, "reward": 160.0, "rlhf": 1201.0},
        "parameters": {"base": 1234567, "rlhf": 1234567},
        "references": {"base": {"cider_d": 0.4312, "bleu_4": 0.1612}, "rlhf": {"cider_d": 0.4687, "bleu_4": 0.1733}},
        "alignment": {"val_text_to_image_r1": 0.4751, "ceiling_r1": 0.8842},
        "reward": {
            "accuracy": interval(0.6914), "rater_agreement": 0.7127, "length_only": interval(0.5213), "text_only": interval(0.5519),
            "alignment_only": interval(0.6222), "image_shuffled": interval(0.5316),
            "facts": {"accuracy": interval(0.7718), "image_shuffled": interval(0.5077)},
            "by_gap": {"small": 0.5623, "middle": 0.6824, "large": 0.8125}, "calibration_error": 0.0429,
            "curve": {"100": interval(0.6111, 0.04), "300": interval(0.6555), "1000": interval(0.6888)},
        },
        "config": {"run": "default", "seed": 0, "rlhf": {"group": 6, "fit": {"lr": 2e-4}}},
    }  # fmt: skip


def made_up_samples(count: int = 8) -> list[Sample]:
    found = []
    for i in range(count):
        scene, rng = sample_scene(0, "test", i), random.Random(i)
        before, after = write_caption(scene, rng), describe(scene)
        words = [
            WordDetail(w, 0.3 + 0.7 * rng.random(), 0.1 + 0.8 * rng.random(), rng.gauss(0.02, 0.04), 1.2 - 0.4 * i) for w in after.split()
        ]
        truth = [{k: float(v) for k, v in vars(check(c, scene)).items() if k != "told"} for c in (before, after)]
        found.append(Sample(render(scene), f"test/{i}", (write_caption(scene, rng),), before, after, *truth, words))
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report") / "new", "Run default", made_up_rows(), made_up_summary(), made_up_samples())


def page_of(folder, rows=(), summary=None, samples=()) -> str:
    return write_report(folder, "a run", list(rows), summary or {}, list(samples)).read_text(encoding="utf-8")


def pictures_in(page: str) -> list[Image.Image]:
    found = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    for image in found:
        image.load()
    return found


def sections_of(page: str) -> list[str]:
    return re.findall("<h2>([^<]+)</h2>", page)


def test_the_page_needs_nothing_beside_it(report):
    page = report.read_text(encoding="utf-8")
    assert report.name == "report.html" and "http:" not in page and "https:" not in page and "<script" not in page
    assert re.findall(r'(?:src|href|srcset)="(?!data:|#)', page) == [] and "url(" not in page and "@import" not in page
    assert all(f'id="{anchor}"' in page for anchor in re.findall(r'href="#([^"]+)"', page))


def test_the_figures_decode_and_lie_beside_the_page(report):
    beside = {path.stem: Image.open(path) for path in report.parent.glob("*.png")}
    stages = {name.split("_")[0] for name in beside}
    assert {"gold_and_proxy", "alpha", "reward_baselines", "reward_comparisons", "words"} <= beside.keys()
    assert {"alignment", "base", "reward", "rlhf"} <= stages
    embedded = pictures_in(report.read_text(encoding="utf-8"))
    assert len(embedded) == len(beside) + len(made_up_samples())
    assert all(len(image.convert("L").getcolors(256) or []) > 10 for image in beside.values()), "a figure is blank"


def test_the_numbers_of_the_summary_appear(report):
    page = unescape(re.sub("<[^>]+>", " ", report.read_text(encoding="utf-8")))
    for number in ("0.781", "0.654", "0.588", "74 %", "71 %", "77 %", "0.469", "0.173", "0.475", "0.884", "1,234,567", "20 min", "95 s"):
        assert number in page, number
    for number in ("0.691", "0.713", "0.521", "0.552", "0.622", "0.532", "0.772", "0.508", "0.562", "0.812", "0.043", '"group": 6'):
        assert number in page, number


def test_the_kept_weights_are_those_the_judge_likes_best(report, tmp_path):
    assert "epoch 6, 5.4 nats" in report.read_text(encoding="utf-8")
    rows = [row | {"val_judge": -float(row["epoch"])} for row in made_up_rows() if row["stage"] == "rlhf"]
    assert "epoch 0, " in page_of(tmp_path, rows), "nothing is better than the base model"
    rung = {"val_alarms": 1.0, "val_alarm_bad_endings": 1.0}
    alarmed = [row | (rung if row["epoch"] > 4 else {}) for row in made_up_rows() if row["stage"] == "rlhf"]
    page = page_of(tmp_path / "alarmed", alarmed)
    assert "epoch 4, " in page and page.count("Alarm: ") == 1 and "Alarm: bad endings, first in epoch 5." in page


def test_captions_are_text_and_never_markup(tmp_path):
    evil = '<b>$x^ & "犬" {y}</b>'
    words = [WordDetail(word, 0.5, 0.5, -0.1, 1.0) for word in evil.split()]
    sample = Sample(Image.new("RGB", (900, 600)), '"><i>', (evil,), evil, evil + " !", {}, {}, words)
    summary = {"evaluation": {"<u>": {"reward": interval(0.5)}}, "checkpoint": "<u>", "config": {"run": "</pre><u>"}}
    page = page_of(tmp_path, summary=summary, samples=[sample])
    assert not re.findall(r"<b>\$|<i>|<u>", page)
    assert page.count(evil.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")) == 3
    assert max(pictures_in(page)[0].size) == 320, "photographs are made smaller"


def test_an_empty_run_is_an_empty_page(tmp_path):
    assert sections_of(page_of(tmp_path)) == [] and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("gold", set()), ("win_rate", set()), ("seconds", set()), ("parameters", set()), ("references", set()), ("alignment", set()),
        ("evaluation", set()), ("reward", {"Reward model"}), ("config", {"Settings"}),
    ],
)  # fmt: skip
def test_each_part_of_the_summary_may_be_absent(tmp_path, part, gone):
    whole = {"Result", "Reward model", "Settings"}
    summary = made_up_summary()
    assert set(sections_of(page_of(tmp_path, summary=summary | {part: None}))) == whole - gone
    del summary[part]
    assert set(sections_of(page_of(tmp_path, summary=summary))) == whole - gone


@pytest.mark.parametrize("part", ["accuracy", "rater_agreement", "length_only", "facts", "by_gap", "calibration_error", "curve"])
def test_each_part_of_the_reward_report_may_be_absent_or_not_a_number(tmp_path, part):
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan}
    reward = copy.deepcopy(made_up_summary()["reward"])
    for missing in ({}, {part: math.nan if isinstance(reward[part], float) else nothing if "value" in reward[part] else {}}):
        page = page_of(tmp_path, summary={"reward": {k: v for k, v in reward.items() if k != part} | missing})
        assert sections_of(page) == ["Reward model"] and "nan" not in re.sub('"data:[^"]+"', "", page)


@pytest.mark.parametrize("stage", ["alignment", "base", "reward", "rlhf"])
def test_a_run_of_one_stage_shows_its_curves(tmp_path, stage):
    page = page_of(tmp_path, [row for row in made_up_rows() if row["stage"] == stage])
    assert "Learning curves" in sections_of(page)
    assert {path.stem.split("_")[0] for path in tmp_path.glob("*_*.png")} - {"gold"} == {stage}


def test_one_epoch_without_gold_is_enough(tmp_path):
    """A run on photographs, killed after its first epoch of refinement, with metrics that were not finite."""
    rows = [{k: v for k, v in row.items() if "gold" not in k} for row in made_up_rows() if row["stage"] == "rlhf" and row["epoch"] < 2]
    page = page_of(tmp_path, [row | {"val_entropy": None, "stopped": "KL above 20 nats"} for row in rows])
    assert sections_of(page) == ["Hidden quality against proxy", "How the two rewards are mixed", "Learning curves"]
    assert "KL above 20 nats" in page and "gamed" not in page


def test_an_evaluation_names_its_checkpoints(tmp_path):
    """What evaluate.py hands over: the main checkpoint first, under its own name; without another, samples show one caption."""
    summary: dict = {
        "checkpoint": "models/a.pt",
        "evaluation": {"models/a.pt": {"reward": interval(1.5), "gold": {"utility": 0.7}}},
        "gold": {"base": {"utility": 0.7}},
    }
    samples = [Sample(s.image, s.key, (), s.after, s.after, s.after_quality, s.after_quality, []) for s in made_up_samples(2)]
    page = page_of(tmp_path, summary=summary, samples=samples)
    assert "models/a.pt" in page and "base model</th>" not in page and page.count("<dt>caption</dt>") == 2
    summary["evaluation"]["models/b.pt"] = {"gold": {"utility": 0.6}}
    summary |= {"gold": {"base": {"utility": 0.7}, "rlhf": {"utility": 0.6}}, "compare": "models/b.pt", "win_rate": interval(0.6)}
    page = page_of(tmp_path, summary=summary, samples=made_up_samples(2))
    assert "models/a.pt beats models/b.pt" in page and "<th>models/a.pt</th><th>models/b.pt</th>" in page
    assert re.search("<th>utility.*?</th><td>0.700</td><td>0.600</td>", page)
    told = made_up_samples(1)[0]
    assert f"<dt>models/b.pt</dt><dd>{told.before}<" in page and f"<dt>models/a.pt</dt><dd>{told.after}<" in page


def test_the_heat_of_a_word_is_its_share_of_the_largest(tmp_path):
    words = [WordDetail("dog", 1.0, 0.5, 0.2, 0.0), WordDetail("cat", 0.0, 0.5, -0.1, 0.0)]
    page = page_of(tmp_path, samples=[Sample(Image.new("RGB", (64, 64)), "k", (), "a", "dog cat", {}, {}, words)])
    strength = [int(tint) for tint in re.findall(r"rgba\([^)]*,(\d+)%\)", page)]
    assert strength == [65, 0, 32, 32, 65, 32, 0, 0], "confidence, alpha, dense, sparse; the base rate is 65 %"
