"""Every knob of the project, on one page: frozen dataclasses filled from YAML and `key.sub=value` arguments.

The defaults here are the built-in benchmark's (`configs/default.yaml` spells them out). This is the only file that knows OmegaConf.
"""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Schedule = Literal["linear", "cosine", "log_linear", "shifted"]
Order = Literal["random", "spread", "left_to_right", "open_end", "plackett_luce", "confidence"]
Stage = Literal["alignment", "base", "reward", "rlhf"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line fit for the terminal."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


HUGE = 1e12
"""No setting means anything beyond; single precision and torch's integers end later."""


@dataclass(frozen=True)
class Group:
    """Settings that belong together. Not-a-number would compare as false with every bound, and spread through all that it touches."""

    @property
    def _name(self) -> str:
        return type(self).__name__.removesuffix("Config").lower()

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            ok = not isinstance(value, int | float) or abs(value) <= HUGE
            _require(ok, f"{self._name}.{f.name}={value}: must be a finite number, and not beyond {HUGE:g}")

    def _at_least(self, least: int, names: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            _require(value >= least, f"{self._name}.{name}={value}: must be at least {least}")

    def _shares(self, names: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            _require(0 <= value < 1, f"{self._name}.{name}={value}: must be in [0, 1)")


@dataclass(frozen=True)
class FitConfig(Group):
    """One stage's optimisation, the same for every stage."""

    epochs: int = 10
    """Passes over `epoch_size` examples; evaluation runs after each."""
    epoch_size: int = 0
    """Examples per epoch; 0 means the whole training split."""
    batch_size: int = 64
    """Examples per update over all processes, before accumulation."""
    grad_accum: int = 1
    """Batches whose gradients are averaged into one update."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup: float = 0.05
    """Share of all updates in which the learning rate rises linearly."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine to zero, or flat."""
    weight_decay: float = 0.01
    """AdamW's; biases and norms do not decay."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm; 0 leaves them as they are."""
    ema_decay: float = 0.0
    """Decay of the weight average that is evaluated and kept; 0 keeps the weights themselves."""
    patience: int = 0
    """Epochs without improvement before the stage stops; 0 never stops early."""
    save_every: int = 50
    """Updates between resumable checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "epochs batch_size grad_accum save_every")
        self._at_least(0, "epoch_size weight_decay max_grad_norm patience")
        self._shares("warmup ema_decay")
        _require(self.lr > 0, f"fit.lr={self.lr}: must be positive")


@dataclass(frozen=True)
class DataConfig(Group):
    source: Literal["scenes", "jsonl", "folder", "imagefolder", "coco", "webdataset", "conceptual_captions", "hub"] = "scenes"
    """`scenes`: the built-in benchmark; `jsonl`: rows of image, captions, split; `folder`: images with .txt sidecars;
    `imagefolder`: metadata.jsonl, .csv or .parquet of file_name, text; `coco`: COCO's or Karpathy's JSON; `webdataset`: img2dataset's tars;
    `conceptual_captions`: Google's TSV of caption, URL; `hub`: a Hugging Face data set of images or of URLs. URLs are fetched."""
    path: str = ""
    """The file or folder; coco, webdataset and conceptual_captions also take a folder or glob of files; hub an id or directory."""
    images: str = ""
    """Root of relative image names in the JSONL or JSON; default: the folder `images` beside it, else its own folder.
    Where fetched images are kept; default: beside the TSV under its name + `_images`, of hub under that in `cache`."""
    downloads: int = 16
    """Images fetched at the same time, at most four of them from one host."""
    train: int = 8000
    """Training images: rendered by scenes, an upper limit elsewhere (0: all); no more images are fetched than the three numbers need."""
    val: int = 400
    """Held-out images of the curves, by which weights are chosen; an upper limit like `train`."""
    test: int = 400
    """Held-out images of the final figures, likewise; people's ratings of them, if any, teach the reward (comparisons of any image do)."""
    captions_per_image: int = 3
    """Captions that scenes writes per image; other sources have their own."""
    max_words: int = 20
    """Longest caption, in tokens; longer ones are left out of training, or cut where an image has no other."""
    tokenizer: str = "words"
    """`words`: a word vocabulary built from the training captions; else a Hugging Face tokenizer id or directory."""
    min_count: int = 1
    """Training occurrences that a word needs to enter the vocabulary of `words`."""
    ratings: str = ""
    """JSONL of human ratings (image, caption, ratings, scale) for the reward stage; empty: simulated raters (scenes only)."""
    comparisons: str = ""
    """JSONL or CSV of recorded comparisons (image, a, b, choice), or TRL's metadata.jsonl, for the reward stage instead of ratings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.source == "scenes" or bool(self.path), f"data.path is needed for data.source={self.source}")
        self._at_least(1, "max_words downloads")
        self._at_least(0, "train val test")
        _require(not (self.ratings and self.comparisons), "data.ratings and data.comparisons: the reward learns from one of them")


@dataclass(frozen=True)
class VisionConfig(Group):
    backbone: str = "patches"
    """`patches`: a small encoder trained here with the alignment model; else a Hugging Face vision model id or directory, kept frozen."""
    width: int = 128
    """Width of the image tokens: of the trained encoder, or of the PCA of the frozen backbone's."""
    image_size: int = 64
    """Side in pixels of the square that `patches` reads; a pretrained backbone brings its own."""
    patch_size: int = 16
    """Side in pixels of the patches that become an image token each."""
    layers: int = 1
    """Transformer layers of `patches`."""
    heads: int = 4
    """Attention heads of `patches`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.backbone == "patches"
        self._at_least(0, "width layers")
        if own:
            self._at_least(1, "width heads image_size patch_size")
        _require(not own or self.width % self.heads == 0, "vision.width must be a multiple of vision.heads")
        _require(not own or self.image_size % self.patch_size == 0, "vision.image_size must be a multiple of vision.patch_size")


@dataclass(frozen=True)
class AlignmentConfig(Group):
    pretrained: str = ""
    """Hugging Face CLIPModel id or directory; empty: train our own towers on the captions."""
    width: int = 128
    """Width of the text tower."""
    layers: int = 1
    """Transformer layers of the text tower; 0 reads a caption as a bag of words."""
    heads: int = 4
    """Attention heads of the text tower."""
    embed: int = 128
    """Width of the joint embedding space."""
    late_interaction: bool = True
    """Compare every word with every image token, too, while training: what an image encoder trained here needs to start at all."""
    dropout: float = 0.0
    """In the text tower and of the image tokens, while they are trained."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=20, batch_size=128, lr=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "width heads embed")
        self._at_least(0, "layers")
        self._shares("dropout")
        _require(self.width % self.heads == 0, "alignment.width must be a multiple of alignment.heads")


@dataclass(frozen=True)
class BaseConfig(Group):
    """The denoiser and its training. With a backbone, width, layers, heads and the tokenizer are its own, whatever is written here."""

    backbone: str = ""
    """Hugging Face GPT-2 id or directory to start from, with its tokenizer; empty: train from scratch at the size below."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the backbone, whose own weights stay until RLHF (needs the extra `peft`); 0 trains everything."""
    width: int = 128
    """Width of the token states."""
    layers: int = 3
    """Transformer blocks, each with self-attention, attention to the image, and an MLP."""
    heads: int = 4
    """Attention heads of a block."""
    dropout: float = 0.0
    """While the base model is trained."""
    schedule: Schedule = "cosine"
    """How many tokens each training step reveals."""
    left_to_right: float = 0.3
    """Share of training captions revealed one word at a time from the left; the rest in random order."""
    open_end: float = 0.0
    """Share of training captions, whatever their order would have been, learned from the left without being told their length, with END
    after the last word: for the order open_end. The rest are told it."""
    image_dropout: float = 0.1
    """Share of training captions that see no image: the unconditional model of guidance and of the reward's grounding features."""
    patch_dropout: float = 0.0
    """Share of an image's tokens that a training caption does not see, drawn each time; the last (a frozen backbone's pooled one) stays."""
    mirror: bool = False
    """Show training images mirrored as often as they are: for captions that do not tell left from right."""
    crops: int = 0
    """Crops of each training image, shown as often as the whole: up to 4 corners, 5 the middle, too; every other mirrored with `mirror`."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=18, batch_size=128, lr=2e-3, ema_decay=0.99))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "width layers heads")
        self._at_least(0, "lora_rank")
        self._shares("dropout image_dropout patch_dropout")
        _require(0 <= self.crops <= 5, f"base.crops={self.crops}: must be from 0 to 5")
        for name in ("left_to_right", "open_end"):
            _require(0 <= getattr(self, name) <= 1, f"base.{name}={getattr(self, name)}: must be in [0, 1]")
        _require(self.width % self.heads == 0, "base.width must be a multiple of base.heads")
        _require(not self.lora_rank or bool(self.backbone), "base.lora_rank needs base.backbone: there is nothing else to adapt")


MOST_STEPS = 10_000
"""Each takes memory, though a caption uses no more than it has tokens."""
SEARCH = "are for sampler.order=left_to_right or open_end with temperature=0, guidance=1, threshold=0 and remask=0"


@dataclass(frozen=True)
class SamplerConfig(Group):
    """Captioning for evaluation and prediction."""

    steps: int = 8
    """Denoising steps of a caption, at most one for every token."""
    schedule: Schedule = "linear"
    """How many tokens each step reveals."""
    order: Order = "spread"
    """Which positions come first; `confidence` has no closed-form probability and is for inference only. `open_end`: from the left until an
    end token, where the others decide the length first; it takes a step for every token and needs base.open_end."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Nucleus of the token distribution to sample from."""
    threshold: float = 0.0
    """Reveal every token that is at least this confident, besides the scheduled ones; 0 turns it off."""
    guidance: float = 1.0
    """Classifier-free guidance on the image; 1 turns it off."""
    remask: int = 0
    """Extra rounds that take back the least confident eighth of the words and write them again."""
    min_words: int = 1
    """Shortest caption, in tokens."""
    max_words: int = 0
    """Longest caption, in tokens; 0 means data.max_words."""
    beams: int = 1
    """Captions kept in the making by a beam search from the left, one word a step; 1 is greedy."""
    lengths: int = 1
    """Lengths that the search tries, the likeliest ones; the likeliest caption per token stays. Not with an open end."""
    clip: float = 0.0
    """Weight of CLIP's cosine beside nats per token in the search's last choice."""
    consensus: float = 0.0
    """Weight of what a caption has in common with the search's other candidates: of their word sequences' mean cosine."""
    both_ways: bool = False
    """The search reads its finished captions from the right, too, and the last choice goes by the mean of both."""
    candidates: int = 1
    """Captions drawn per image; the reward model keeps the best."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "steps candidates min_words beams lengths")
        self._at_least(0, "remask max_words temperature")
        _require(self.steps <= MOST_STEPS, f"sampler.steps={self.steps}: must be at most {MOST_STEPS}; a token takes no more than one")
        _require(not 0 < self.max_words < self.min_words, "sampler.max_words must not be less than sampler.min_words")
        _require(self.candidates == 1 or self.temperature > 0, "sampler.candidates > 1 needs sampler.temperature > 0")
        _require(0 < self.top_p <= 1 and 0 <= self.threshold <= 1, "sampler.top_p is in (0, 1], sampler.threshold in [0, 1]")
        drawn = self.order not in ("left_to_right", "open_end") or self.temperature or self.guidance != 1 or self.remask or self.threshold
        _require(self.beams == self.lengths == 1 or not drawn, f"sampler.beams and sampler.lengths {SEARCH}")
        told = "sampler.order=open_end knows no length: lengths=1, remask=0 and threshold=0 go with it"
        _require(self.order != "open_end" or not (self.lengths > 1 or self.remask or self.threshold), told)
        searched = self.beams > 1 or self.lengths > 1
        for name in ("clip", "consensus", "both_ways"):
            chosen = f"sampler.{name} chooses among the captions of a search: set sampler.beams or sampler.lengths"
            _require(not getattr(self, name) or searched, chosen)

    @property
    def plain(self) -> "SamplerConfig":
        """The same without a search or a choice: for training's curves, which are about the model, and many."""
        return replace(self, beams=1, lengths=1, clip=0.0, consensus=0.0, both_ways=False, candidates=1)


@dataclass(frozen=True)
class RewardConfig(Group):
    comparisons: int = 1000
    """Comparisons that simulated raters make of the base model's captions (scenes); of recorded ones and ratings at most these (0: all)."""
    curve: tuple[int, ...] = (100, 300, 1000, 3000)
    """Numbers of comparisons for the report's learning curve."""
    members: int = 4
    """Ensemble members; each sees its own resample and its own features."""
    pessimism: float = 0.5
    """The reward is the ensemble's mean minus this many standard deviations."""
    reader: bool = True
    """Also try the transformer reader on top of the linear head; it stays if held-out likelihood gains two standard errors."""
    reader_layers: int = 1
    """Blocks of the reader, started from the denoiser's last ones."""
    repeats: float = 0.0
    """Pairs of the base model's captions of which one repeats itself, and loses, as a share of people's comparisons, which show no such."""
    even_sources: float = 0.5
    """How evenly sources of ratings count: 0, by their numbers of comparisons; 1, each as much as any other; between, by these numbers to
    the power of 1 minus this."""
    l2: float = 0.01
    """Ridge penalty of the linear head."""
    length_bias: float = 0.0
    """Liking that simulated raters add per word, in utility: a fault for studies of what it does to RLHF."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=5, batch_size=64, lr=3e-4))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "members reader_layers")
        self._at_least(0, "comparisons pessimism repeats")
        _require(0 <= self.even_sources <= 1, f"reward.even_sources={self.even_sources}: must be between 0 and 1")
        _require(self.l2 > 0, f"reward.l2={self.l2}: must be positive")
        _require(min(self.curve, default=1) > 0, f"reward.curve={list(self.curve)}: must be positive numbers")


@dataclass(frozen=True)
class ShapingConfig(Group):
    """R(t) = alpha(c) R_dense(t) + (1 - alpha(c)) R_sparse."""

    clip_weight: float = 0.5
    """Weight of the dense CLIP reward; 0 is the sparse-only ablation."""
    preference_weight: float = 0.5
    """Weight of the sparse reward."""
    fade: float = 1.6
    """Share of the training over which alpha falls to 0, in a straight line: 1.6 leaves three eighths of it; 0 keeps it up to the end."""
    kappa: float = 0.0
    """How strongly confidence moves alpha; 0 keeps it constant, positive leans on CLIP where confidence is low."""
    shuffle_alpha: bool = False
    """Deal the alphas of a rollout out to its tokens at random: the same histogram, without what confidence tells."""
    dense: Literal["leave_one_word_out", "step_potential", "caption"] = "step_potential"
    """Who earns CLIP's score: each word what it adds, each step what it adds, or every token all of it (no credit by token)."""
    credit: Literal["local", "to_go", "potential"] = "local"
    """What a token gets of it: `local`: what its own step or word earned; `to_go`: that and all that came after; `potential`: minus the
    score of the draft it was written into, which cannot move the optimum."""
    alpha_min: float = 0.1
    """Least alpha, before it fades, when both weights are positive."""
    alpha_max: float = 0.9
    """Greatest alpha, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "clip_weight preference_weight fade")
        _require(self.clip_weight + self.preference_weight > 0, "one of shaping.clip_weight and shaping.preference_weight must be positive")
        _require(not self.fade or self.preference_weight > 0, "shaping.preference_weight=0 needs shaping.fade=0: nothing would be left")
        _require(0 <= self.alpha_min <= self.alpha_max <= 1, "0 <= shaping.alpha_min <= shaping.alpha_max <= 1 must hold")
        potential = self.credit == "potential"
        _require(not potential or self.dense == "step_potential", "shaping.credit=potential needs shaping.dense=step_potential")
        _require(not potential or self.preference_weight > 0, "shaping.credit=potential needs a positive shaping.preference_weight")


@dataclass(frozen=True)
class RLHFConfig(Group):
    method: Literal["policy_gradient", "distil"] = "policy_gradient"
    """How: the policy gradient of sampled captions; or distil: of nine captions that a search finds of each training image the best, by
    likelihood and the two rewards as `shaping` weighs them, is learned like one of the data set's (`sparse`, `neighbours`, `fit` count)."""
    start: str = ""
    """Checkpoint of the captioner that is refined and that the KL holds to, a refined one for a second round; empty: the base model."""
    first: str = ""
    """Config file of a refinement that comes before, laid over these settings, such as configs/references.yaml: a run named RUN/first (or
    first), from whose captioner this one goes on."""
    sparse: Literal["preference", "references"] = "preference"
    """The sparse reward: the reward model of people's comparisons, or CIDEr-D with people's captions (no reward stage)."""
    neighbours: int = 20
    """With references: training images most like the image, whose captions count for three quarters; 0: the image's own alone."""
    group: int = 6
    """Captions sampled per image and compared with each other."""
    steps: int = 8
    """Denoising steps of a rollout, at most one for every token."""
    schedule: Schedule = "linear"
    """How many tokens each step of a rollout reveals."""
    order: Order = "spread"
    """Order of the rollouts; it must not be `confidence`, whose probability has no closed form."""
    temperature: float = 0.5
    """Of the policy that is sampled and improved: low, so that it is close to the greedy captions people will see."""
    inner_updates: int = 1
    """Updates per rollout; 1 is the plain policy gradient."""
    clip: float = 0.2
    """PPO clip range of the ratio."""
    kl: float = 0.03
    """Weight of the exact KL to the frozen base model, per caption."""
    kl_target: float = 6.0
    """Nats per caption at which the controller holds the KL by raising its weight, which must not be 0; 0 keeps the weight fixed."""
    kl_stop: float = 20.0
    """Nats per caption, five updates running, at which training stops."""
    anchor: float = 0.0
    """Weight of the base objective on reference captions."""
    logprob: Literal["trajectory", "mean_field"] = "trajectory"
    """Probabilities that are improved and held close to the base: exact, or each token's from the fully masked caption (diffu-GRPO)."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=16, epoch_size=400, batch_size=16, lr=3e-4, ema_decay=0.9))

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.group > 1, "rlhf.group must be at least 2: captions are compared within it")
        self._at_least(1, "steps inner_updates")
        self._at_least(0, "kl kl_target anchor neighbours")
        _require(self.kl > 0 or not self.kl_target, "rlhf.kl=0: a weight of 0 cannot be raised to hold rlhf.kl_target; set that to 0, too")
        _require(self.steps <= MOST_STEPS, f"rlhf.steps={self.steps}: must be at most {MOST_STEPS}; a token takes no more than one")
        _require(self.clip > 0, f"rlhf.clip={self.clip}: must be positive")
        _require(
            self.order != "confidence",
            "rlhf.order=confidence has no closed-form probability; use random, spread, left_to_right, open_end or plackett_luce",
        )
        _require(self.temperature > 0, "rlhf.temperature must be positive: a greedy policy does not explore")
        _require(min(self.inner_updates, self.fit.grad_accum) == 1, "rlhf.inner_updates > 1 does not go with rlhf.fit.grad_accum > 1")
        _require(self.fit.save_every % self.inner_updates == 0, "rlhf.fit.save_every must be a multiple of rlhf.inner_updates")


@dataclass(frozen=True)
class Config:
    run: str = "default"
    """Name of the run, from the config file's name if not given. `default` writes to models/ and results/, any other to folders in them."""
    seed: int = 0
    """Of all that is random: scenes, first weights, batches, samples, simulated raters."""
    threads: int = 0
    """CPU threads; 0 takes the idle cores when a run starts, and a resumed run keeps what it had."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 saves time and memory; a processor that would only emulate it computes in float32, as results/config.json then tells."""
    start_from: str = ""
    """Folder with the alignment, base and reward checkpoints of another run to build on; default: the run's own."""
    track: str = ""
    """Accelerate tracker that also gets the metrics (tensorboard, wandb, trackio); empty: metrics.jsonl alone."""
    data: DataConfig = field(default_factory=DataConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    rlhf: RLHFConfig = field(default_factory=RLHFConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_from", self.start_from and str(Path(self.start_from)))  # models/run/ is models/run
        run = Path(self.run)
        inside = not run.is_absolute() and ".." not in run.parts
        _require(inside, f"run={self.run}: names folders inside models/ and results/, none outside")
        _require(self.sampler.min_words <= self.data.max_words, "sampler.min_words must not be more than data.max_words")
        for name, group in (("sampler", self.sampler), ("rlhf", self.rlhf)):
            if group.order == "open_end":
                _require(self.base.open_end > 0, f"{name}.order=open_end needs base.open_end: a model that was told all lengths cannot end")
                most = f"order=open_end takes one for each of up to {self.data.max_words} tokens, spread can do with few"
                _require(group.steps >= self.data.max_words, f"{name}.steps={group.steps}: {most}")
        drafted = self.shaping.dense == "step_potential" and self.shaping.clip_weight > 0 and self.rlhf.method == "policy_gradient"
        told = "shaping.dense=step_potential needs drafts, and these a length: rlhf.order=open_end has none"
        _require(not (drafted and self.rlhf.order == "open_end"), told)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """A whole run's: references as reward ask for no reward model."""
        return tuple(stage for stage in STAGES if stage != "reward" or self.rlhf.sparse == "preference")

    @property
    def models(self) -> Path:
        return Path("models") if self.run == "default" else Path("models") / self.run

    @property
    def results(self) -> Path:
        return Path("results") if self.run == "default" else Path("results") / self.run


REFINING = ("sampler", "shaping", "rlhf")
"""Groups that tell one refinement of the same captioner from another."""


def _keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass tree, groups included."""
    keys: list[str] = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            keys += _keys(f.type, prefix + f.name + ".")
    return keys


def _check_keys(tree: Any, where: str, prefix: str = "") -> None:
    known = _keys(Config)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if value == "???":  # OmegaConf's word for a value that is missing: it would be passed over
            raise ConfigError(f"{where}: '{key}' has no value")
        if key not in known:
            near = f"sampler.{key}" if f"sampler.{key}" in known else difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}: unknown key '{key}'; did you mean '{near}'?")
        if isinstance(value, dict):
            _check_keys(value, where, key + ".")
        elif inside := [k for k in known if k.startswith(key + ".")]:
            raise ConfigError(f"{where}: '{key}' is a group of settings, '{inside[0]}' is one of them")


Layer = tuple[str, Any]
"""Where settings come from, for messages, and the settings."""


def _read(where: str, read: Callable[[], Any]) -> Layer:
    """The settings as they are, one that is a mapping."""
    try:
        node = read()
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from None
    except Exception as error:  # PyYAML's own error classes are not OmegaConf's
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = OmegaConf.to_container(node)
    _require(isinstance(tree, dict | None), f"{where}: expected key: value pairs")
    return where, tree or {}


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file that is no config of a run. Raises ConfigError."""
    return _read(str(path), lambda: OmegaConf.load(path))[1]


def _layer(where: str, read: Callable[[], Any]) -> Layer:
    where, tree = _read(where, read)
    _check_keys(tree, where)
    return where, tree | ({"mixed_precision": "no"} if tree.get("mixed_precision") is False else {})  # YAML's `no`, unquoted


def _arguments(overrides: Sequence[str]) -> list[Layer]:
    """Nothing after the = is an empty text, which YAML would read as null."""
    for text in overrides:
        _require("=" in text, f"{text}: expected key.sub=value")
    given = {text: text if text.partition("=")[2] else f"{text}''" for text in overrides}
    return [_layer(text, lambda text=text: OmegaConf.from_dotlist([given[text]])) for text in overrides]


@cache
def _defaults() -> DictConfig:
    """Made once: OmegaConf takes 50 ms over it."""
    return OmegaConf.structured(Config)


def _merged(layers: Sequence[Layer]) -> Config:
    tree, where = deepcopy(_defaults()), ""
    try:
        for where, node in layers:  # noqa: B007
            tree = OmegaConf.unsafe_merge(tree, node)  # without a copy of all of it
        where = ""
        return cast(Config, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        reason = str(error).splitlines()[0].replace("Value '$VALUE' of type '$VALUE_TYPE'", "a value")
        raise ConfigError(": ".join(part for part in (where, error.full_key, reason) if part)) from None


def load_config(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Defaults, then YAML files, then `key.sub=value` arguments; later ones win.

    Raises ConfigError with one line for an unknown key (naming the nearest valid one), a wrong type or an impossible combination.
    """
    layers = [_layer(str(f), lambda f=f: OmegaConf.load(f)) for f in files]
    name = [("", {"run": Path(files[-1]).stem})] if files else []
    return _merged([*name, *layers, *_arguments(overrides)])


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A config with single settings changed. Raises ConfigError."""
    return _merged([("", to_plain(config)), *_arguments(overrides)]) if overrides else config


def first_round(config: Config, file: Path) -> Config:
    """Of the refinement that `rlhf.first` puts before, described by this file. Raises ConfigError."""
    where, settings = _layer(str(file), lambda: OmegaConf.load(file))
    if other := settings.keys() - set(REFINING):
        raise ConfigError(
            f"{where}: '{min(other)}' does not belong here: rlhf.first shares the run's models and data, and sets {', '.join(REFINING)}"
        )
    run, start = "first" if config.run == "default" else f"{config.run}/first", config.start_from or str(config.models)
    whole = replace(config, run=run, start_from=start, rlhf=replace(config.rlhf, first=""))
    return _merged([("", to_plain(whole)), (where, settings)])


def config_from_plain(tree: dict[str, Any]) -> Config:
    """The config that `to_plain` wrote into a checkpoint. Raises ConfigError."""
    return _merged([("", tree)])


def to_plain(config: Config) -> dict[str, Any]:
    """Nested dict of plain values, for checkpoints, JSON and YAML."""
    return dataclasses.asdict(config)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`key.sub: value` of what `to_plain` made, as JSON keeps it."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        plain = list(value) if isinstance(value, tuple) else value
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": plain}
    return found


def settings_of(config: Config, *groups: str) -> dict[str, Any]:
    """`group.key: value` of these groups without their `fit`, of which the engine keeps its own account."""
    found = flat({name: value for name, value in to_plain(config).items() if name in groups})
    return {key: value for key, value in found.items() if ".fit." not in key}
