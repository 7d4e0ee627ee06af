"""The stages in order: what each needs, what it leaves, and the summary of a run."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.corpus import Corpus
from ..data.sources import Example, load_examples
from ..data.text import words_and_owners
from ..evaluation.evaluate import agreement, build_corpus, preference, with_looks, write_captions
from ..models.denoiser import DiffusionCaptionModel
from ..models.reward import Evidence, RewardModel, Words
from ..models.saved import (
    FILES,
    Eyes,
    captioner_kind,
    earlier,
    load_denoiser,
    load_eyes,
    load_reward,
    same_eyes,
    save_reward,
    settings_from,
    with_config,
)
from ..repair import Editor
from ..utils import checkpoint
from ..utils.command import find_config
from ..utils.config import STAGES, ConfigError, Stage, first_round, flat, to_plain
from ..utils.files import fingerprint, write_json
from ..utils.seeding import seed_of
from .alignment import train_alignment
from .base import train_base
from .comparisons import Judgements, rated, recorded, simulated
from .reward import calibrate, examine, fit_ensemble, head_of, train_reward
from .reward_report import reward_report
from .rlhf import train_rlhf
from .run import Run

REPEATED = 0.3
"""CIDEr-D that a caption loses, as a reward, for saying something twice."""
CENTRED = 200
"""Captions of the base model's that give the reward its zero and its unit, at least."""
JUDGE = "judge_model.pt"
"""The held-out judge's file, beside the reward model's."""
READ: dict[Stage, tuple[str, ...]] = {
    "alignment": ("seed", "data", "vision", "alignment"), "base": ("seed", "start_from", "data", "base"),
    "reward": ("seed", "start_from", "data", "reward"), "rlhf": ("seed", "start_from", "data", "shaping", "rlhf"),
}  # fmt: skip
"""Groups of the config that a kept stage must have been trained with."""
OF_ONE = {"data.max_words": "alignment", "data.test": "reward", "data.ratings": "reward", "data.comparisons": "reward"}
"""Of the data's settings those that one stage alone goes by."""
WORDS = ("data.source", "data.path", "data.tokenizer", "data.min_count", "data.max_words")
"""What the vocabulary and the longest caption come from."""
WHERE = ("data.path", "data.images", "data.downloads")
"""Where the data lie may change."""
FETCHED = ("conceptual_captions", "hub")
"""Sources of links, of which some answer tomorrow and not today: a stage resumes on other images if they make as many updates an epoch."""


WITHOUT = "--stage base does without, and with --config configs/references.yaml besides captions are the reward"
"""What works where nobody has judged captions."""


class MissingStage(ValueError):
    """A stage whose results are needed is not there; the message says which command makes them."""


@dataclass(frozen=True)
class Pipeline:
    run: Run
    within: "Pipeline | None" = None
    """The run of which this is a part, with its models and data."""

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        return self.within.examples if self.within else load_examples(self.run.config.data, self.run.config.seed)

    @cached_property
    def first(self) -> "Pipeline | None":
        """The refinement that `rlhf.first` puts before this one's, a run of its own in the folders of this one."""
        if not self.run.config.rlhf.first:
            return None
        config = first_round(self.run.config, find_config(self.run.config.rlhf.first))
        return Pipeline(replace(self.run, config=config, log=self.run.log.part("first", config.results)), self)

    @cached_property
    def words(self) -> Words:
        return words_and_owners(self.eyes.tokenizer)

    @cached_property
    def eyes(self) -> Eyes:
        eyes = self.within.eyes if self.within else load_eyes(self.find("alignment")).to(self.run.device)
        return with_config(eyes, self.run.config)

    @cached_property
    def corpora(self) -> dict[str, Corpus]:
        if self.within:
            return self.within.corpora
        return {split: build_corpus(self.eyes, examples, self.run.cache) for split, examples in self.examples.items()}

    def find(self, kind: Stage) -> Path:
        """The checkpoint of an earlier stage, see `earlier`. Raises MissingStage."""
        path = self.within.find(kind) if self.within else earlier(self.run.config, kind)
        if path.exists():
            return path
        if self.run.config.start_from:
            raise MissingStage(f"{path} does not exist; start_from is the folder of another run's checkpoints, as models/RUN")
        stage = "base" if kind == "alignment" else kind
        raise MissingStage(f"{path} does not exist; the same command with --stage {stage} makes it")

    def train(self, stages: Sequence[Stage]) -> None:
        """Run the stages; when resuming, those that are complete are left as they are."""
        for stage in stages:
            if self.kept(stage):
                continue
            self.examples  # noqa: B018  nothing is taken away for a data set that is not there
            self.begin(stage)
            started = time.perf_counter()
            getattr(self, stage)()
            self.run.accelerator.wait_for_everyone()
            self.note(self.times() | {stage: time.perf_counter() - started})

    def check(self, stages: Sequence[Stage]) -> None:
        """Raises ConfigError, before hours of work, for a kept stage that was made with other settings than these, and if the reward stage
        would have nothing to learn from."""
        for stage in stages:
            if self.kept(stage):
                self.check_settings(stage)
        self.check_judgements(stages)
        if self.first and "rlhf" in stages:
            self.first.check(["rlhf"])
            if self.first.run.config.rlhf.sparse == "preference" and "reward" not in stages:
                self.find("reward")  # with references as its own reward the run has no such stage

    def check_settings(self, stage: Stage) -> None:
        path, groups = self.run.config.models / FILES[stage], READ[stage]
        made, now = (flat(to_plain(config)) for config in (settings_from(checkpoint.load(path, stage)["config"], path), self.run.config))
        shape = ("base.width", "base.layers", "base.heads") if self.run.config.base.backbone else ()  # the backbone's, in the file
        for key, value in now.items():
            read = key.split(".")[0] in groups and OF_ONE.get(key, stage) == stage
            if read and key not in (*WHERE, *shape) and not key.endswith(".save_every") and made[key] != value:
                raise ConfigError(f"{path}: was trained with {key}={made[key]}, now it is {value}; without --resume it is trained anew")

    def check_judgements(self, stages: Sequence[Stage]) -> None:
        data, done = self.run.config.data, earlier(self.run.config, "reward").exists()
        path = data.ratings or data.comparisons
        asked = "rlhf" in stages and self.run.config.rlhf.sparse == "preference" and not done
        to_do = not self.kept("reward") if "reward" in stages else asked
        if not to_do:
            return
        if not path and data.source != "scenes":
            raise ConfigError(f"data.source={data.source}: the reward stage needs data.ratings or data.comparisons; {WITHOUT}")
        if path and not Path(path).is_file():
            raise ConfigError(f"{path}: no such file; the reward stage would learn from it; {WITHOUT}")

    def times(self) -> dict[str, float]:
        """Seconds of every stage that is complete, in the process that completed it."""
        path = self.run.config.results / "stages.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note(self, times: dict[str, float]) -> None:
        if self.run.main:
            write_json(self.run.config.results / "stages.json", times)

    def complete(self, stage: Stage) -> bool:
        return stage in self.times() and (self.run.config.models / FILES[stage]).exists()

    def kept(self, stage: Stage) -> bool:
        """Whether the stage is complete and not to be trained again."""
        return self.run.resume and self.complete(stage)

    def holding(self, *built_on: Path, **more: Any) -> Run:
        """The run, held to the data set, to these checkpoints and to `more` when it is resumed."""
        if self.run.config.data.source not in FETCHED:
            more["the data set"] = [(split, e.key, e.captions) for split in ("train", "val") for e in self.examples[split]]
        given = {name: fingerprint([], value) for name, value in more.items()}
        return replace(self.run, given=given | {path.name: checkpoint.weights_digest(path) for path in built_on})

    def begin(self, stage: Stage) -> None:
        """A stage that starts over takes along what was built on it: nothing may be resumed on top of other weights, or told of them."""
        after = STAGES[STAGES.index(stage) :]
        lost = stage in self.times() and not (self.run.config.models / FILES[stage]).exists()
        over = lost or not (self.run.resume and self.run.last(stage).exists())
        if over and self.run.main:
            for name in reversed(after):
                self.run.last(name).unlink(missing_ok=True)
                self.run.log.rewind(name, -1)
        if over and self.first and stage != "rlhf":
            self.first.begin("alignment")
        times = self.times()
        self.run.accelerator.wait_for_everyone()
        self.note({name: value for name, value in times.items() if name not in after})

    def alignment(self) -> None:
        train_alignment(self.holding(), self.examples)

    def base(self) -> None:
        if not self.run.config.start_from and not self.complete("alignment"):
            self.train(["alignment"])
        self.tell_what_stays()
        train_base(self.holding(self.find("alignment")), self.eyes, self.with_training_looks())

    def tell_what_stays(self) -> None:
        """A base model writes words that the alignment model was taught, whatever the settings say now."""
        path, now = self.find("alignment"), flat(to_plain(self.run.config))
        made = flat(to_plain(settings_from(checkpoint.load(path, "alignment")["config"], path)))
        for key in (key for key in WORDS if made[key] != now[key]):
            told = "%s: was trained with %s=%s, which stays (now it is %s); --stage alignment would train it anew"
            logging.getLogger(__name__).warning(told, path, key, made[key], now[key])

    def with_training_looks(self) -> dict[str, Corpus]:
        """The splits, with the training images seen in all the ways that the base model is to see them."""
        run, accelerator = self.run, self.run.accelerator
        looks = (self.eyes, run.config.base, run.cache, accelerator.process_index, accelerator.num_processes)
        return self.corpora | {"train": with_looks(self.corpora["train"], *looks)}

    def load_captioner(self, path: Path) -> tuple[Eyes, DiffusionCaptionModel]:
        """A base or refined model, and the eyes with the shape that it was trained in. Raises ConfigError if its eyes are others."""
        found, model = load_denoiser(path, captioner_kind(path))
        its, own = ((eyes.tokenizer.get_vocab(), eyes.vision.fingerprint()) for eyes in (found, self.eyes))
        if its != own:
            raise ConfigError(f"{path}: has other eyes or another vocabulary than {self.find('alignment')}")
        return replace(self.eyes, config=replace(self.eyes.config, base=found.config.base)), model.to(self.run.device)

    def load_reward(self, path: Path) -> RewardModel:
        """A reward model or judge. Raises ConfigError if its eyes are others: its words and its images would mean something else."""
        its, reward = load_reward(path, self.words)
        if not same_eyes(its, self.eyes):
            raise ConfigError(f"{path}: has other eyes or another vocabulary than {self.find('alignment')}; --stage reward trains it anew")
        return reward.to(self.run.device)

    def reward(self) -> None:
        """The reward model, and a judge from other comparisons that only chooses among RLHF checkpoints."""
        (eyes, base), config = self.load_captioner(self.find("base")), self.run.config
        evidence = Evidence(base, self.eyes.alignment, self.words, config.reward.reader_layers).to(self.run.device)
        found = self.judgements(base)
        train, val = examine(evidence, found.train), examine(evidence, found.val)
        used = head_of(train, config.reward.comparisons or len(train), config.reward.repeats)
        run = self.holding(self.find("base"), comparisons=[*used.pairs.comparisons, *val.pairs.comparisons])
        reward, facts = train_reward(run, evidence, used, val, found.smoothing)
        calibrate(reward, head_of(val, len(val)))
        judge = RewardModel(evidence, config.reward.members, 0, config.reward.pessimism).to(self.run.device)
        fit_ensemble(judge, val, config.reward, found.smoothing, seed_of(config.seed, "judge"))
        for model in (reward, judge):
            self.centre(model)
        reward.weak = Editor(base, self.eyes.tokenizer, reward).usual(self.corpora["val"])
        if self.run.main:
            facts |= reward_report(reward, found, train, used.pairs.asked, config.reward, config.seed)
            write_json(config.results / "reward_report.json", facts)
            save_reward(config.models / JUDGE, eyes, judge, {"comparisons": found.val.asked})
            save_reward(config.models / FILES["reward"], eyes, reward, facts)

    def judgements(self, base: DiffusionCaptionModel) -> Judgements:
        """People's where there are some, else the simulated raters'."""
        config, data = self.run.config, self.run.config.data
        source = data.ratings or data.comparisons or "data.source=scenes"
        if data.ratings:
            found, none = rated(config, base, self.corpora["test"]), "no two captions to compare of the test images"
        elif data.comparisons:
            found, none = recorded(config, base, self.corpora), "no comparison of the data set's images"
        else:
            found, none = simulated(config, base, self.corpora), "no two captions to compare of the scenes"
        if few := [name for name in ("train", "val", "test") if not getattr(found, name).asked]:
            raise ValueError(f"{source}: {none} that would be for the reward model's own {', '.join(few)}")
        if tied := [name for name in ("train", "val") if not ((pairs := getattr(found, name)).label[: pairs.asked] < 2).any()]:
            raise ValueError(f"{source}: nobody preferred a caption to another in what would be for {', '.join(tied)}: all ties")
        return found

    def centre(self, reward: RewardModel) -> None:
        """Put the score's zero and unit on the base model's captions of validation images, several of an image where there are few."""
        corpus, config, device = self.corpora["val"], self.run.config, self.run.device
        rows = list(range(min(len(corpus), CENTRED)))
        plan = replace(config.sampler.plain, temperature=1.0, order="random", guidance=1.0, threshold=0.0, remask=0)
        t = write_captions(reward.evidence.denoiser, corpus, rows, plan, config.seed, group=-(-CENTRED // len(rows))).trajectory
        scores = reward.members(t.x0.to(device), t.length.to(device), corpus.image(rows).to(device), corpus.joint[rows].to(device))
        reward.set_base(scores[..., 0])

    def refined(self) -> Path:
        """The captioner that this part of a run leaves."""
        self.train(["rlhf"])
        return self.run.config.models / FILES["rlhf"]

    def rlhf(self) -> None:
        """From people's preferences, or from their captions, which then judge, too: those of validation images are never a reward."""
        config = self.run.config
        built_on = [self.first.refined() if self.first else Path(config.rlhf.start or self.find("base"))]
        eyes, start = self.load_captioner(built_on[0])
        corpora = self.with_training_looks() if config.rlhf.method == "distil" else self.corpora
        if config.rlhf.sparse == "references":
            train = self.corpora["train"]
            reward, judge = agreement(train, config.rlhf.neighbours, REPEATED), agreement(train)
        else:
            built_on += [path := self.find("reward"), path.with_name(JUDGE)]
            reward, judge = (preference(self.load_reward(p)) for p in built_on[1:])
        found_for = {"the training images": [e.key for e in self.examples["train"]]} if config.rlhf.method == "distil" else {}
        train_rlhf(self.holding(*built_on, **found_for), eyes, start, reward, judge, corpora, self.words)
