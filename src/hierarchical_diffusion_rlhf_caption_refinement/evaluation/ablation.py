"""What a grid of runs found: tables, curves and a page, all from the records of its runs.

A record holds one seed of one arm in one regime. Seeds have scenes of their own, which all arms of a seed share; so intervals come from
drawing seeds, and scenes within each, again (paired: the differences on the same scenes). With few seeds such an interval is too narrow;
Student's t over the seeds' differences, which stands beside it, allows for that.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..utils.grid import Grid, spelled
from .metrics import Interval
from .report import STYLE

Record = dict[str, Any]
Arm = list[Record]
"""Records of one arm in one regime, by seed."""
DRAWS = 2000


def read_records(folder: Path) -> list[Record]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*/*.json"))]
    return sorted(found, key=lambda r: r["seed"])


def nested_bootstrap(values: Sequence[np.ndarray], draws: int = DRAWS) -> Interval:
    """Mean of the groups' means with its 95 % percentile interval: groups (seeds) are drawn, then values (scenes) within each."""
    rng = np.random.default_rng(0)

    def drawn() -> float:
        groups = (values[i] for i in rng.integers(len(values), size=len(values)))
        return float(np.mean([group[rng.integers(len(group), size=len(group))].mean() for group in groups]))

    low, high = np.percentile([drawn() for _ in range(draws)], [2.5, 97.5])
    return Interval(float(np.mean([group.mean() for group in values])), float(low), float(high))


def utility(arm: Arm) -> Interval:
    return nested_bootstrap([np.array(r["utility"]) for r in arm])


def gaps(arm: Arm, baseline: Arm) -> list[np.ndarray]:
    """Utility of the arm less the baseline's on the same scenes, of the seeds that both have."""
    other = {r["seed"]: np.array(r["utility"]) for r in baseline}
    return [np.array(r["utility"]) - other[r["seed"]] for r in arm if r["seed"] in other]


def paired_difference(arm: Arm, baseline: Arm) -> Interval | None:
    found = gaps(arm, baseline)
    return nested_bootstrap(found) if found else None


def difference_over_seeds(arm: Arm, baseline: Arm) -> Interval | None:
    """The same difference with Student's 95 % interval of the seeds' means; none from one seed."""
    means = [gap.mean() for gap in gaps(arm, baseline)]
    if len(means) < 2:
        return None
    middle, error = float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(means)) * student(len(means) - 1)
    return Interval(middle, middle - error, middle + error)


@cache
def student(freedom: int) -> float:
    """The .975 quantile of Student's t, from a million draws: numpy has no table of it."""
    return float(np.quantile(np.abs(np.random.default_rng(0).standard_t(freedom, 1_000_000)), 0.95))


def gold_curve(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Captions sampled so far, and utility of the held-out (validation) images."""
    rows = record["rows"]
    return np.array([r["step"] * record["captions_per_update"] for r in rows]), np.array([r["gold_utility"] for r in rows])


def captions_until(record: Record, target: float) -> float:
    """Captions sampled when the curve first reaches the target, on straight lines between epochs; infinite if it never does."""
    x, y = gold_curve(record)
    if y[0] >= target:
        return 0.0
    for i in range(1, len(y)):
        if y[i] >= target:
            return float(x[i - 1] + (x[i] - x[i - 1]) * (target - y[i - 1]) / (y[i] - y[i - 1]))
    return math.inf


def budget_shares(arm: Arm, baseline: Arm) -> list[float]:
    """Captions until the baseline's last utility, as a share of all that the baseline sampled, by seed; infinite where never."""
    last = {r["seed"]: (g[0][-1], g[1][-1]) for r in baseline if len((g := gold_curve(r))[0]) > 1}
    return [float(captions_until(r, last[r["seed"]][1]) / last[r["seed"]][0]) for r in arm if r["seed"] in last]


def spell_shares(shares: Sequence[float]) -> str:
    """The median seed's, of an even number the lower one of the two, and how many get there at all."""
    if not shares:
        return "–"
    middle, reached = sorted(shares)[(len(shares) - 1) // 2], sum(map(math.isfinite, shares))
    return f"{middle:.2f} ({reached} of {len(shares)})" if math.isfinite(middle) else f"not reached ({reached} of {len(shares)})"


def kept_row(record: Record) -> Record:
    """The epoch whose weights were kept: the judge's favourite without an alarm."""
    return max((r for r in record["rows"] if not r.get("alarms")), key=lambda r: r["judge"])


def mean(arm: Arm, value: Callable[[Record], float]) -> float:
    return float(np.mean([value(r) for r in arm]))


def of_peak(record: Record) -> float:
    """Last utility as a share of the highest, on the held-out images."""
    y = gold_curve(record)[1]
    return float(y[-1] / y.max())


def spell(interval: Interval | None, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})" if interval else "–"


def limits(interval: Interval | None) -> str:
    return f"{interval.low:+.3f} to {interval.high:+.3f}" if interval else "–"


COLUMNS = (
    "arm", "seeds", "utility (95 %)", "less the baseline's, paired (95 %)", "t over seeds (95 %)",
    "accuracy", "fluency", "words", "beats base", "KL",
    "captions to the baseline's last", "minutes", "last, held out", "last / peak: mean, worst", "collapsed", "alarms", "stopped", "command",
)  # fmt: skip


def line(name: str, arm: Arm, baseline: Arm, command: str) -> list[str]:
    ends = [of_peak(r) for r in arm]
    return [
        name.replace("_", " "), str(len(arm)), spell(utility(arm)), spell(paired_difference(arm, baseline), "+"),
        limits(difference_over_seeds(arm, baseline)),
        *(f"{mean(arm, lambda r, k=k: r['test'][k]):.3f}" for k in ("accuracy", "fluency")),
        f"{mean(arm, lambda r: r['test']['mean_words']):.1f}", f"{mean(arm, lambda r: r['win_rate']['value']):.2f}",
        f"{mean(arm, lambda r: kept_row(r)['kl']):.1f}", spell_shares(budget_shares(arm, baseline)),
        f"{mean(arm, lambda r: r['rows'][-1]['seconds'] / 60):.1f}", f"{mean(arm, lambda r: gold_curve(r)[1][-1]):.3f}",
        f"{np.mean(ends):.3f}, {min(ends):.3f}", f"{sum(end < 0.95 for end in ends)} of {len(ends)}",
        alarmed(arm),
        f"{sum(bool(r['rows'][-1].get('stopped')) for r in arm)} of {len(arm)}", f"`{command}`",
    ]  # fmt: skip


def alarmed(arm: Arm) -> str:
    """How many seeds raised an alarm, and which; older records do not tell which."""
    count = sum(any(row.get("alarms") for row in r["rows"]) for r in arm)
    names = sorted({key[6:].replace("_", " ") for r in arm for row in r["rows"] for key in row if key.startswith("alarm_")})
    return f"{count} of {len(arm)}" + (f": {', '.join(names)}" if names else "")


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def band(arm: Arm, x: Callable[[Record], np.ndarray], y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over seeds of x and y at each epoch that all seeds have, and twice the standard error of y."""
    count = min(len(r["rows"]) for r in arm)
    values = np.array([[row[y] for row in r["rows"][:count]] for r in arm])
    error = values.std(0, ddof=1) / math.sqrt(len(arm)) if len(arm) > 1 else np.zeros(count)
    return np.mean([x(r)[:count] for r in arm], axis=0), values.mean(0), 2 * error


def distance(record: Record) -> np.ndarray:
    return np.sqrt(np.maximum([row["kl"] for row in record["rows"]], 0))


def draw(axes: Axes, arms: dict[str, Arm], x: Callable[[Record], np.ndarray], y: str) -> None:
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for i, (name, arm) in enumerate(arms.items()):
        at, middle, error = band(arm, x, y)
        colour = colours[(2 * i) % 20 + (i >= 10)]
        axes.plot(at, middle, "o-", label=name.replace("_", " "), color=colour, linewidth=1.2)
        axes.fill_between(at, middle - error, middle + error, alpha=0.12, color=colour, linewidth=0)


def pictures(folder: Path, regime: str, arms: dict[str, Arm]) -> list[Path]:
    """Learning curves by captions sampled; gold, judge and proxy by distance from the base model."""
    panels = {
        "learning": [("utility, held out", "captions sampled", lambda r: gold_curve(r)[0], "gold_utility"),
                     ("accuracy, held out", "captions sampled", lambda r: gold_curve(r)[0], "gold_accuracy")],
        "distance": [("gold: utility, held out", "√KL, √nats per caption", distance, "gold_utility"),
                     ("judge, never rewarded", "√KL, √nats per caption", distance, "judge"),
                     ("proxy: reward", "√KL, √nats per caption", distance, "reward")],
    }  # fmt: skip
    paths = []
    with matplotlib.rc_context(cast(Any, STYLE)):
        for name, drawn in panels.items():
            figure = Figure((4.4 * len(drawn), 4.4))
            for axes, (title, x_label, x, y) in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
                axes.set(title=title, xlabel=x_label)
                draw(axes, arms, x, y)
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
            paths.append(folder / f"{name}_{regime}.png")
            figure.savefig(paths[-1], metadata={"Software": None})
    return paths


def comparable(arms: dict[str, Arm], baseline: Arm) -> dict[str, Arm]:
    """The arms whose curves can be laid over the baseline's: seeds differ by more than arms do, so they must have all of its seeds."""
    seeds = {r["seed"] for r in baseline}
    return {name: arm for name, arm in arms.items() if {r["seed"] for r in arm} >= seeds}


def section(grid: Grid, folder: Path, regime: str, records: list[Record]) -> str:
    """One regime: its table and pictures."""
    arms = {arm: [r for r in records if (r["regime"], r["arm"]) == (regime, arm) and "error" not in r] for arm in grid.arms}
    arms = {name: arm for name, arm in arms.items() if arm}
    if grid.baseline not in arms:
        return ""
    baseline = arms[grid.baseline]
    lines = [line(name, arm, baseline, f"--only '{regime}/{name}/*'") for name, arm in arms.items()]
    accuracy = np.mean([r["reward_accuracy"]["value"] for r in baseline])
    shown = "\n\n".join(f"![{p.stem.replace('_', ' ')}]({p.name})" for p in pictures(folder, regime, comparable(arms, baseline)))
    set_ = ", ".join(f"`{s}`" for s in spelled(grid.settings | grid.regimes[regime])) or "as configured"
    known = f"The baseline's reward model is right on {accuracy:.3f} of held-out choices."
    return f"## {regime}\n\nSettings of all arms: {set_}. {known}\n\n{table(COLUMNS, lines)}\n\n{shown}\n"


def write_page(grid: Grid, folder: Path, path: Path) -> Path:
    """`README.md` and pictures beside the records; of those the ones whose arm and regime the grid still has."""
    records = read_records(folder)
    failed = [
        f"- {r['regime']}/{r['arm']}/{r['seed']}: {r['error']}"
        for r in records
        if "error" in r and r["regime"] in grid.regimes and r["arm"] in grid.arms
    ]
    arms = table(["arm", "settings"], [[name.replace("_", " "), " ".join(f"`{s}`" for s in spelled(own)) or "as configured"]
                                       for name, own in grid.arms.items()])  # fmt: skip
    parts = [section(grid, folder, regime, records) for regime in grid.regimes]
    shown = Path(*path.parts[-3:])  # no page knows the machine that made it
    baseline = grid.baseline.replace("_", " ")
    text = PAGE.format(name=grid.name, path=shown, baseline=baseline, arms=arms, parts="\n".join(filter(None, parts)))
    page = folder / "README.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text + ("\n## Failed\n\n" + "\n".join(failed) + "\n" if failed else ""), encoding="utf-8")
    return page


PAGE = """# Ablation: {name}

Made by `python scripts/ablate.py {path}`; again from the records, without training, by `python scripts/ablate.py {path} --report-only`.
A line alone: the first command with what the line's last column says. The baseline is *{baseline}*.

{arms}

Utility, accuracy, fluency and words are of the kept weights (the held-out judge's favourite of those that raise no alarm) on the test
scenes; *beats base* is how often their caption has the higher utility, ties half. Intervals: 2,000 draws of seeds, and of scenes in each;
with few seeds they are too narrow: *t over seeds* is the difference's by Student's t of the seeds' means.
*Captions to the baseline's last*: those sampled until the utility on validation scenes first reaches the baseline's at its end, as a share
of all that the baseline sampled; median over seeds. *Minutes* are the updates', without the evaluation. *Last*: the same utility after the
last epoch; *last / peak*: over its highest; *collapsed* counts seeds below .95. *KL* is in nats per caption. *Alarms* counts seeds with one
in any epoch, *stopped* those that a guard ended.
The pictures show the arms that have all of the baseline's seeds; bands are two standard errors over seeds.

{parts}"""
