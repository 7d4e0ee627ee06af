"""A grid of runs from a YAML file: arms x regimes x seeds, and the stages that they share."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .config import Config, ConfigError, Stage, flat, load_config, read_yaml, to_plain

Settings = dict[str, Any]
"""`key.sub: value` of the config."""
NAME = re.compile(r"[\w.+-]+")

LATER: dict[Stage, tuple[str, ...]] = {"base": ("sampler", "reward", "shaping", "rlhf"), "reward": ("shaping", "rlhf"), "rlhf": ()}
"""Groups of the config that matter only after a stage."""
TAKEN = ("run", "seed", "threads", "start_from")
"""What a grid sets itself, run by run."""


@dataclass(frozen=True)
class Job:
    """One process' work: stages of one run."""

    name: str
    """Unique in the grid; folders are called after it."""
    seed: int
    files: tuple[str, ...]
    arguments: tuple[str, ...]
    """Config files and what is laid over them."""
    run: str
    stages: tuple[Stage, ...]
    needs: tuple[str, ...] = ()
    """Jobs that come first; the folder of the last holds the checkpoints to build on."""
    regime: str = ""
    arm: str = ""
    """Both empty for a stage that arms share."""

    @cached_property
    def config(self) -> Config:
        """Raises ConfigError."""
        return load_config(self.files, self.arguments)

    @property
    def results(self) -> Path:
        return Path("results") / self.run

    def settings(self) -> Settings:
        """Those of its config's groups that its stages read."""
        return {key: value for key, value in flat(to_plain(self.config)).items() if key.split(".")[0] not in LATER[self.stages[-1]]}

    @property
    def kept_settings(self) -> Path:
        """What it was trained with."""
        return self.results / "settings.json"

    def outdated(self) -> bool:
        """Whether it was trained with other settings than these."""
        path = self.kept_settings
        return path.exists() and not json.loads(path.read_text(encoding="utf-8")).items() <= self.settings().items()

    def record(self, output: Path) -> Path:
        """The file of an arm's record."""
        return output / f"{self.name}.json"


@dataclass(frozen=True)
class Grid:
    name: str
    """Of the file."""
    baseline: str
    """Arm that the others are compared with."""
    arms: dict[str, Settings]
    """What tells each arm; settings of the reward give the arm a reward model of its own."""
    regimes: dict[str, Settings]
    """What all arms of a regime share, from the reward stage on."""
    seeds: tuple[int, ...]
    config: tuple[str, ...]
    """Config files, relative to the grid's."""
    settings: Settings
    """Of every run."""

    def jobs(self) -> list[Job]:
        """All jobs, seed by seed, what others need before them."""
        found = []
        for seed in self.seeds:
            base = f"base/{seed}"
            found.append(self._job(base, seed, {}, ("alignment", "base")))
            for regime, shared in self.regimes.items():
                reward = f"{regime}/reward/{seed}"
                found.append(self._job(reward, seed, shared, ("reward",), (base,)))
                for arm, own in self.arms.items():
                    apart = any(key.startswith("reward.") for key in own)
                    stages: tuple[Stage, ...] = ("reward", "rlhf") if apart else ("rlhf",)
                    needs = (base,) if apart else (base, reward)
                    found.append(self._job(f"{regime}/{arm}/{seed}", seed, shared | own, stages, needs, regime=regime, arm=arm))
        return found

    def facts(self, job: Job) -> dict[str, Any]:
        """What the record of an arm begins with."""
        own = self.settings | self.regimes[job.regime] | self.arms[job.arm]
        return {"regime": job.regime, "arm": job.arm, "seed": job.seed, "settings": spelled(own)}

    def _job(self, name: str, seed: int, settings: Settings, stages: tuple[Stage, ...], needs: tuple[str, ...] = (), **cell: str) -> Job:
        run = f"ablation/{self.name}/{name}"
        built_on = {"start_from": f"models/ablation/{self.name}/{needs[-1]}"} if stages == ("rlhf",) else {}
        arguments = spelled(self.settings | settings | {"run": run, "seed": seed, "threads": 1} | built_on)
        return Job(name, seed, self.config, tuple(arguments), run, stages, needs, **cell)

    def check(self) -> None:
        """Raises ConfigError if a setting is none: of one seed, because loading a config takes a while."""
        for job in replace(self, seeds=self.seeds[:1]).jobs():
            load_config(job.files, job.arguments)


def spelled(settings: Settings) -> list[str]:
    """As arguments of `train.py`."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def _settings(where: str, own: Any) -> Settings:
    """Nested or not, as config files have them. Raises ConfigError."""
    if not isinstance(own, dict):
        raise ConfigError(f"{where}: expected key: value pairs")
    found = flat(own)
    if taken := [key for key in found if key in TAKEN]:
        raise ConfigError(f"{where}: {taken[0]}: a grid sets that itself, run by run")
    return found


def _own(where: str, own: Any) -> Settings:
    """Those of an arm or a regime, which cannot tell apart what all of them build on. Raises ConfigError."""
    found, groups = _settings(where, {} if own is None else own), LATER["base"]
    if wrong := [key for key in found if key.split(".")[0] not in groups]:
        why = "all arms of a seed share its data, alignment and base model"
        raise ConfigError(f"{where}: {wrong[0]}: {why}; this is for the grid's settings, arms and regimes have {', '.join(groups)}")
    return found


def _listed(where: str, value: Any, kind: type) -> tuple[Any, ...]:
    """One or more values of this type in a list. Raises ConfigError."""
    if not isinstance(value, list) or not value or any(type(one) is not kind for one in value):
        raise ConfigError(f"{where}: expected a list of {'whole numbers' if kind is int else 'texts'}, got {value!r}")
    return tuple(value)


def read_grid(path: Path, seeds: Sequence[int] = ()) -> Grid:
    """The grid of a YAML file, perhaps with other seeds. Raises ConfigError."""
    tree = {"config": [], "seeds": [0], "settings": {}, "regimes": {"default": {}}} | read_yaml(path)
    known = {f.name for f in fields(Grid)} - {"name"}
    if wrong := sorted(known ^ tree.keys()):
        raise ConfigError(f"{path}: {wrong[0]}: a grid has arms and a baseline, and may have config, regimes, seeds, settings")
    if wrong := [key for key in ("arms", "regimes") if not isinstance(tree[key], dict)]:
        raise ConfigError(f"{path}: {wrong[0]}: expected key: value pairs")
    arms, regimes = ({str(name): _own(f"{path}: {name}", own) for name, own in tree[key].items()} for key in ("arms", "regimes"))
    for name in (*arms, *regimes):
        if not NAME.fullmatch(name) or name in ("base", "reward"):
            raise ConfigError(f"{path}: '{name}' is no name of an arm or a regime: letters, digits and _.+- are, base and reward are taken")
    if (baseline := str(tree["baseline"])) not in arms:
        raise ConfigError(f"{path}: the baseline '{baseline}' is none of the arms")
    files = [tree["config"]] if isinstance(tree["config"], str) else tree["config"]
    config = tuple(str(path.parent / name) for name in _listed(f"{path}: config", files, str)) if files else ()
    settings, listed = _settings(f"{path}: settings", tree["settings"]), _listed(f"{path}: seeds", tree["seeds"], int)
    return Grid(path.stem, baseline, arms, regimes, tuple(dict.fromkeys(seeds or listed)), config, settings)
