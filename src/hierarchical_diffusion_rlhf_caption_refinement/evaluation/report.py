"""The report of a run: one HTML file that needs nothing beside it, and its figures as PNG files.

Whatever the rows of metrics.jsonl and the summary hold gets its section; what they do not hold is left out.
"""

import base64
import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

Row = dict[str, Any]
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f6db0", "#d1731f", "#3f9a66", "#8a63b3", "#888888"
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
    "axes.axisbelow": True, "lines.markersize": 3.5, "figure.constrained_layout.use": True, "savefig.dpi": 170,
    "axes.prop_cycle": f"cycler('color', {[BLUE, ORANGE, GREEN, PURPLE]})", "axes.formatter.useoffset": False,
}  # fmt: skip
MEASURES = {
    "utility": ("utility", "The hidden quality: true, fluent, and better for telling more. Training never sees it; 1 is perfect."),
    "accuracy": ("accuracy", "Share of the facts a caption tells that hold in its image."),
    "specificity": (
        "specificity",
        "Scenes: the share of all facts that is told, and rightly. Photographs: nats that the words tell.",
    ),
    "fluency": ("fluency", "1 is a grammatical caption; every slip costs 40 % or more of it."),
    "cider_d": ("CIDEr-D", "Agreement with people’s captions of the same image, rare words counting more; 0 to 10."),
    "bleu_4": ("BLEU-4", "Share of the runs of up to four words that people’s captions of the image use, too."),
    "rouge_l": ("ROUGE-L", "Words in the same order as in one of people’s captions; 0 to 1."),
    "reward": ("reward", "The reward model’s score; 0 is an average sample of the base model, 1 a standard deviation better."),
    "repetition": ("repetition", "Share of captions that say a content word or a pair of words twice."),
    "mean_words": ("words", "Words per caption."),
}
GOLD = {f"val_gold_{q}": q for q in ("utility", "accuracy", "specificity", "fluency")}
PANELS: dict[str, tuple[str, str, dict[str, str]]] = {
    "alignment_loss": ("Alignment: loss", "nats", {"loss": "training images"}),
    "alignment_retrieval": ("Alignment: an image found by its caption", "share, held out", {
        "val_text_to_image_r1": "first of all images", "val_text_to_image_r10": "among the first ten"}),
    "base_loss": ("Base model: loss", "nats per token", {"nll": "training images", "val_loss": "held out"}),
    "base_gold": ("Base model: hidden quality", "share, held out", GOLD),
    "base_cider": ("Base model: agreement with references", "CIDEr-D, held out", {"val_cider_d": "held out"}),
    "reward_loss": ("Reward model: loss", "nats per comparison, held out", {"val_loss": "held out"}),
    "reward_accuracy": ("Reward model: accuracy", "share of comparisons", {"accuracy": "training", "val_accuracy": "held out"}),
    "rlhf_reward": ("Refinement: reward", "standard deviations of the base, or CIDEr-D", {
        "reward": "sampled, training images", "val_reward": "held out", "val_judge": "held out, judge"}),
    "rlhf_gold": ("Refinement: hidden quality", "share, held out", GOLD),
    "rlhf_kl": ("Refinement: KL from the base model", "nats per caption", {"kl": "training images", "val_kl": "held out"}),
    "rlhf_entropy": ("Refinement: entropy", "nats per token", {"entropy": "training images", "val_entropy": "held out"}),
}  # fmt: skip
"""Learning curves: stage and file; title, unit, and what the log calls the lines."""
HEAT = {"confidence": "confidence", "alpha": "α, share of dense at first", "dense": "dense (CLIP)", "sparse": "sparse (people)"}


@dataclass(frozen=True)
class WordDetail:
    """Where a word's reward comes from; `dense` and `sparse` each in any unit that all words share."""

    word: str
    confidence: float
    alpha: float
    dense: float
    sparse: float


@dataclass(frozen=True)
class Sample:
    """A test image with its captions; `words` are those of `after`, and empty where nothing is known about them."""

    image: Image.Image
    key: str
    references: tuple[str, ...]
    before: str
    after: str
    before_quality: dict[str, float]
    after_quality: dict[str, float]
    words: list[WordDetail]


def write_report(folder: Path, title: str, rows: list[Row], summary: Row, samples: list[Sample]) -> Path:
    """Writes `report.html` and the figures into the folder, which it makes; returns the page.

    Args: rows: of metrics.jsonl, in order; summary: as in training_summary.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, summary = present(rows), present(summary)
    settings = escape(json.dumps(summary.get("config"), indent=2, ensure_ascii=False))
    with matplotlib.rc_context(cast(Any, STYLE)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # captions come in any script
        sections = {
            "Result": headline(summary),
            "Captions": sample_cards(samples, names_of(summary)),
            "Hidden quality against proxy": overoptimisation(folder, rows),
            "Where the reward of a word comes from": token_heat(folder, samples),
            "How the two rewards are mixed": alpha_history(folder, rows),
            "Reward model": reward_section(folder, summary.get("reward", {})),
            "Learning curves": learning_curves(folder, rows),
            "Settings": f"<details><summary>Show</summary><pre>{settings}</pre></details>" if "config" in summary else "",
        }
    shown = [(f"s{i}", escape(name), body) for i, (name, body) in enumerate(sections.items()) if body]
    links = "".join(f'<a href="#{i}">{name}</a> ' for i, name, _ in shown)
    parts = "".join(f'<section id="{i}"><h2>{name}</h2>{body}</section>' for i, name, body in shown)
    path = folder / "report.html"
    path.write_text(PAGE.format(title=escape(title), style=CSS, links=links, parts=parts), encoding="utf-8")
    return path


def present(tree: Any) -> Any:
    """Without what is null or nan, so that `name in row` says whether there is a number."""
    if isinstance(tree, dict):
        return {k: present(v) for k, v in tree.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}
    return [present(v) for v in tree] if isinstance(tree, list) else tree


def spell(value: Any) -> str:
    """A number, or an interval {value, low, high}, for a table."""
    if not isinstance(value, dict):
        return "–" if value is None else f"{value:.3f}" if abs(value) < 5 else f"{value:,.1f}"
    return f"{spell(value['value'])} <small>{spell(value['low'])} to {spell(value['high'])}</small>" if value else "–"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first of a line is its heading."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{line[0]}</th>{''.join(f'<td>{cell}</td>' for cell in line[1:])}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>' if lines else ""


def names_of(summary: Row) -> tuple[str, str]:
    """What the report calls the captioner that it is about, and the one that this is compared with: an evaluation names checkpoints."""
    return (summary["checkpoint"], summary.get("compare", "")) if "checkpoint" in summary else ("refined model", "base model")


def measures_of(summary: Row) -> dict[str, Row]:
    """All that is measured of the data set's captions and of each captioner's, by what the report calls them."""
    if "checkpoint" in summary:
        return {name: values | values.get("references", {}) | values.get("gold", {}) for name, values in summary["evaluation"].items()}
    parts = [summary.get(part, {}) for part in ("evaluation", "references", "gold")]
    names = {"data": "data set", "base": "base model", "rlhf": "refined model"}
    found = {name: {k: v for part in parts for k, v in part.get(who, {}).items()} for who, name in names.items()}
    return {name: values for name, values in found.items() if values}


def headline(summary: Row) -> str:
    """Who wins, a table of all measures, and retrieval, times and sizes in a line each."""
    (name, other), found, facts, win = names_of(summary), measures_of(summary), dict[str, str](), ""
    measures = [(k, f"{label}<p>{text}</p>") for k, (label, text) in MEASURES.items() if any(k in values for values in found.values())]
    if rate := summary.get("win_rate"):
        value, low, high = (f"{100 * rate[k]:.0f} %" for k in ("value", "low", "high"))
        win = f'<p class="lead"><b>{value}</b> of the test images: {escape(name)} beats {escape(other)}.'
        win += f"<small>95 % interval {low} to {high}; by hidden utility, ties count half.</small></p>"
    if "val_text_to_image_r1" in (alignment := summary.get("alignment", {})):
        most = f"; captions allow {spell(alignment['ceiling_r1'])} at most" if "ceiling_r1" in alignment else ""
        facts["A caption’s image found first"] = f"{spell(alignment['val_text_to_image_r1'])} of held-out images{most}"
    times = {k: f"{s:.0f} s" if s < 100 else f"{s / 60:.0f} min" for k, s in summary.get("seconds", {}).items()}
    facts["Time"] = " · ".join(f"{escape(k)} {time}" for k, time in times.items())
    facts["Parameters"] = " · ".join(f"{escape(k)} {count:,}" for k, count in summary.get("parameters", {}).items())
    lines = [[label, *(spell(values.get(k)) for values in found.values())] for k, label in measures]
    notes = "".join(f"<p>{fact}: {text}</p>" for fact, text in facts.items() if text)
    return win + table(["test images", *map(escape, found)], lines) + notes


def panel(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure that a phone shows at its full width."""
    figure = Figure((4.6, 3.0))
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def picture(path: Path, figure: Figure, alt: str) -> str:
    """Keeps the figure as a file and returns it as HTML."""
    figure.savefig(path, metadata={"Software": None})
    return f'<figure><img class="plot" alt="{escape(alt)}" src="{embedded(path.read_bytes())}"></figure>'


def embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def draw_lines(axes: Axes, rows: list[Row], names: dict[str, str], x: Callable[[Row], float]) -> None:
    """A line for every metric that the rows have."""
    for name, label in names.items():
        if points := [(x(row), row[name]) for row in rows if name in row]:
            axes.plot(*zip(*points, strict=True), "o-", label=label)
    if len(axes.lines) > 1:
        axes.legend()


def learning_curves(folder: Path, rows: list[Row]) -> str:
    stops = [f"<p>{escape(r['stage'])} stopped in epoch {r['epoch']}: {escape(r['stopped'])}.</p>" for r in rows if r.get("stopped")]
    pictures = []
    for name, (title, unit, names) in PANELS.items():
        of_stage = [row for row in rows if row["stage"] == name.split("_")[0]]
        if any(metric in row for row in of_stage for metric in names):
            figure, axes = panel(title, "epoch", unit)
            draw_lines(axes, of_stage, names, lambda r: r["epoch"])
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            pictures.append(picture(folder / f"{name}.png", figure, f"{title} by epoch"))
    return f'{"".join(stops)}<div class="grid">{"".join(pictures)}</div>' if pictures else ""


def alarms_of(rows: list[Row]) -> dict[str, int]:
    """Every alarm that rang, in words, and the first epoch in which it did."""
    rung = [(key, row["epoch"]) for row in reversed(rows) for key in row if key.startswith("val_alarm_")]
    return {key.removeprefix("val_alarm_").replace("_", " "): epoch for key, epoch in rung}


def overoptimisation(folder: Path, rows: list[Row]) -> str:
    """Proxies and hidden quality against the distance from the base model; the weights that were kept are marked."""
    found = [row for row in rows if row["stage"] == "rlhf" and {"val_kl", "val_judge"} <= row.keys()]
    kept = max((row for row in found if not row.get("val_alarms")), key=lambda r: r["val_judge"], default=None)
    if kept is None:
        return ""

    def distance(row: Row) -> float:
        return math.sqrt(max(row["val_kl"], 0.0))

    gold = any("val_gold_utility" in row for row in found)
    figure = Figure((4.6, 2.7 * (1 + gold)))
    panels = figure.subplots(1 + gold, 1, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        axes.axvline(distance(kept), color=GREY, linestyle="--", linewidth=1, label="kept weights")
    draw_lines(panels[0], found, {"val_reward": "reward", "val_judge": "judge, never rewarded"}, distance)
    panels[0].set(title="Proxy: what training can see", ylabel="standard deviations of the base, or CIDEr-D")
    if gold:
        panels[1].set_prop_cycle(color=[GREEN])
        draw_lines(panels[1], found, {"val_gold_utility": "hidden utility"}, distance)
        panels[1].set(title="Gold: what nothing in training sees", ylabel="utility, at most 1")
    panels[-1].set_xlabel("distance from the model that was refined: √KL, √nats per caption")
    text = f"Kept were the weights without an alarm whose captions the judge likes best: epoch {kept['epoch']}, "
    text += f"{spell(kept['val_kl'])} nats per caption."
    for name, epoch in alarms_of(found).items():
        text += f" Alarm: {name}, first in epoch {epoch}."
    why = " If the proxy rises while the hidden quality falls, the reward is being gamed." if gold else ""
    return f"<p>{text}{why}</p>" + picture(folder / "gold_and_proxy.png", figure, "Proxy and gold against √KL")


def alpha_history(folder: Path, rows: list[Row]) -> str:
    names = [f"alpha_{i / 10:.1f}" for i in range(10)]
    found = [row for row in rows if row["stage"] == "rlhf" and {"alpha", *names} <= row.keys()]
    if not found:
        return ""
    figure, axes = panel("Mixing weight α of the words", "epoch", "α (0: people only, 1: CLIP only)")
    epochs, share = np.array([row["epoch"] for row in found]), np.array([[row[name] for row in found] for name in names])
    axes.grid(False)
    mesh = axes.pcolormesh(np.append(epochs - 0.5, epochs[-1] + 0.5), np.linspace(0, 1, 11), share, cmap="Blues", vmin=0.0)
    axes.plot(epochs, [row["alpha"] for row in found], "o-", color=ORANGE, label="mean")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.legend(loc="upper right")
    figure.colorbar(mesh, ax=axes, label="share of words")
    text = "A word’s reward is α times the dense CLIP credit plus 1 − α times the sparse preference, each in its own standard deviations."
    return f"<p>{text}</p>" + picture(folder / "alpha.png", figure, "Histogram of α by epoch")


def reward_section(folder: Path, reward: Row) -> str:
    """Accuracy beside what it must be compared with, how it grows with comparisons, and finer figures in a table."""
    facts, agreement, pictures = reward.get("facts", {}), reward.get("rater_agreement"), ""
    cells = {
        "reward model": reward.get("accuracy"), "image swapped": reward.get("image_shuffled"), "CLIP only": reward.get("alignment_only"),
        "text only": reward.get("text_only"), "length only": reward.get("length_only"),
    }  # fmt: skip
    bars = {label: row for label, row in reversed(cells.items()) if row}
    curve = dict(sorted((int(n), row) for n, row in reward.get("curve", {}).items() if row))
    for name, rows in {"reward_baselines": bars, "reward_comparisons": curve}.items():
        if not rows:
            continue
        values = [row["value"] for row in rows.values()]
        ends = np.array([[row["value"] - row["low"], row["high"] - row["value"]] for row in rows.values()]).clip(0).T
        if rows is bars:
            figure, axes = panel("Predicting people’s choices", "held-out accuracy, 95 % intervals", "")
            axes.barh(list(bars), values, color=[BLUE if b == "reward model" else "#b5b5b5" for b in bars], height=0.6, xerr=ends)
            axes.set_xlim(0, 1)
        else:
            figure, axes = panel("What more comparisons bring", "comparisons for training", "held-out accuracy, 95 % intervals")
            axes.errorbar(list(curve), values, ends, fmt="o-", capsize=2)
            axes.set_xscale("log")
            axes.set_xticks(list(curve), [f"{n:,}" for n in curve])
            axes.minorticks_off()
        line = axes.axvline if rows is bars else axes.axhline
        line(0.5, color="#555555", linewidth=1, linestyle=":", label="chance")
        if agreement is not None:
            line(agreement, color=ORANGE, linestyle="--", label=f"two raters agree: {agreement:.2f}")
        figure.legend(loc="outside lower center", ncols=2)
        pictures += picture(folder / f"{name}.png", figure, axes.get_title(loc="left"))
    cells |= {f"{gap} difference in quality": value for gap, value in reward.get("by_gap", {}).items()}
    cells |= {"one fact made wrong": facts.get("accuracy"), "one fact made wrong, image swapped": facts.get("image_shuffled")}
    cells |= {"two raters agree": agreement, "calibration error": reward.get("calibration_error")}
    alarm = "<p>Above what an unerring rater reaches: look for a leak before believing it.</p>" if reward.get("above_ceiling") else ""
    figures = f'<div class="grid">{pictures}</div>' if pictures else ""
    return figures + alarm + table(["accuracy, held out", ""], [[k, spell(v)] for k, v in cells.items() if v is not None])


def sample_cards(samples: list[Sample], names: tuple[str, str]) -> str:
    """Images with what is said about them; one caption each where nothing was refined. The names are those of after and before."""
    refined, html = any(s.before != s.after for s in samples), ""
    for s in samples:
        image, buffer = s.image.convert("RGB"), io.BytesIO()
        image.thumbnail((320, 320))
        image.save(buffer, "PNG")
        said = [("data set", s.references[0], {})] if s.references else []
        said += [(names[1], s.before, s.before_quality)] if refined else []
        texts = ""
        for who, caption, quality in [*said, (names[0] if refined else "caption", s.after, s.after_quality)]:
            marks = " · ".join(f"{k} {quality[k]:.2f}" for k in GOLD.values() if k in quality)
            texts += f"<dt>{escape(who)}</dt><dd>{escape(caption)}<small>{marks}</small></dd>"
        html += f'<article><img alt="{escape(s.key)}" src="{embedded(buffer.getvalue())}"><dl>{texts}</dl></article>'
    return html and f'<div class="cards">{html}</div>'


def token_heat(folder: Path, samples: list[Sample]) -> str:
    """Every word on the colour of its values: blue above and orange below zero, the stronger the nearer to the largest of its kind."""
    shown, html = [s for s in samples if s.words][:6], ""
    if not shown:
        return ""
    largest = {kind: max(abs(getattr(w, kind)) for s in shown for w in s.words) or 1.0 for kind in ("dense", "sparse")}

    def colour(kind: str, word: WordDetail) -> tuple[float, float, float, float]:
        value = getattr(word, kind)
        return *to_rgb(GREY if kind not in largest else ORANGE if value < 0 else BLUE), 0.65 * abs(value) / largest.get(kind, 1.0)

    def span(kind: str, word: WordDetail) -> str:
        tint = ",".join(f"{c:.0%}" for c in colour(kind, word))
        return f'<span style="background:rgba({tint})" title="{getattr(word, kind):.3f}">{escape(word.word)}</span>'

    for s in shown:
        lines = (f"<dt>{label}</dt><dd>{' '.join(span(kind, w) for w in s.words)}</dd>" for kind, label in HEAT.items())
        html += f'<dl class="heat">{"".join(lines)}</dl>'
    figure = Figure((7.0, 0.4 + 1.55 * len(shown)))
    for axes, s in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        axes.imshow([[colour(kind, w) for w in s.words] for kind in HEAT], aspect="auto")
        axes.set_xlim(-0.5, max(len(s.words) for s in shown) - 0.5)
        axes.set_yticks(range(len(HEAT)), HEAT.values())
        axes.set_xticks(range(len(s.words)), [w.word for w in s.words], rotation=35, ha="left", rotation_mode="anchor", parse_math=False)
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    text = "Dense: what the CLIP score gains by this word. Sparse: how well people are predicted to like the whole caption. Blue is above "
    text += "and orange below zero, relative to the largest value here; α and confidence run from 0 to 1."
    image = picture(folder / "words.png", figure, "Confidence, α, dense and sparse reward of every word")
    return f"<p>{text}</p>{html}<details><summary>As a figure</summary>{image}</details>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body><h1>{title}</h1><nav>{links}</nav>{parts}</body></html>
"""
CSS = """:root{color-scheme:light dark;--ink:#1c1c1c;--soft:#666;--line:#ddd;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--soft:#a0a0a0;--line:#3a3a3a;--back:#141414}
.plot{filter:invert(.92) hue-rotate(180deg)}}*{box-sizing:border-box}
body{max-width:64rem;margin:0 auto;padding:1rem;color:var(--ink);background:var(--back);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line)}
nav a{color:var(--soft);margin-right:1rem;font-size:.9rem;display:inline-block}p{max-width:44rem;margin:.5rem 0}.lead{font-size:1.15rem}
small{color:var(--soft);font-size:.8rem;display:block}summary{cursor:pointer}pre{overflow-x:auto;font-size:.8rem}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0}thead th{font-size:.85rem;overflow-wrap:anywhere}
th,td{padding:.4rem 1rem .4rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
tbody th{font-weight:600}th p{margin:0;font-weight:400;font-size:.8rem;color:var(--soft)}td small{white-space:nowrap}
.grid,.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1.5rem}
figure{margin:.5rem 0}.plot{width:100%;max-width:36rem;height:auto}article img{width:100%;border-radius:4px}
article{display:grid;grid-template-columns:8rem 1fr;gap:1rem;align-items:start}dl{margin:0}
dt{font-size:.75rem;color:var(--soft);overflow-wrap:anywhere}dd{margin:0 0 .5rem;overflow-wrap:anywhere;line-height:1.35}
.heat{display:grid;grid-template-columns:8rem 1fr;gap:.15rem .6rem;margin:1.2rem 0}.heat dd{margin:0}
dd small{font-size:.72rem}.heat span{padding:.05rem .2rem;border-radius:3px}
@media(max-width:36rem){article{grid-template-columns:6rem 1fr}.heat{grid-template-columns:1fr}th,td{padding-right:.5rem}
td small{white-space:normal;min-width:3rem}thead th{font-size:.75rem}}
"""
