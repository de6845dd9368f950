"""The schema of a run: what a recipe may say, and nothing else.

Every section is a frozen pydantic model that forbids unknown keys. Rules that concern one section stand
beside it; rules that concern several stand in `Recipe`. Composition of files, overrides and the wording of
errors are in `framework.recipe.compose` and `framework.recipe.errors`. The `model` section, which is also
used without a recipe, has a file of its own.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from framework.data.limits import DECODE_SECONDS, READ_SECONDS
from framework.recipe.augment_sections import Augment, ColorJitter, RandAugment, ScaleJitter
from framework.recipe.cache_section import Cache, ShardFolder
from framework.recipe.checkpoint_section import Best, Checkpoint, check_best
from framework.recipe.clip_section import Clip
from framework.recipe.guard_sections import Guards
from framework.recipe.init_sections import ImageInit, Init
from framework.recipe.model_sections import (
    AnyModel,
    Model,
    ModelSection,
    Pool,
    Position,
    ScaleUp,
    Tube,
    TubeSet,
)
from framework.recipe.sections import (
    BrokenRule,
    Decay,
    Few,
    Folder,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Section,
)
from framework.recipe.target_sections import Labelled
from framework.recipe.video_model_sections import MTV, Gelu, Masking, TimeSformer, VideoMAE, ViT, ViViT

__all__ = [
    "MTV",
    "AnyModel",
    "Augment",
    "Best",
    "BrokenRule",
    "Cache",
    "Checkpoint",
    "Clip",
    "ColorJitter",
    "Data",
    "Engine",
    "Evaluation",
    "Gelu",
    "Guards",
    "ImageInit",
    "Init",
    "Masking",
    "Model",
    "Optimizer",
    "Pool",
    "Position",
    "RandAugment",
    "Recipe",
    "ScaleJitter",
    "ScaleUp",
    "Schedule",
    "Source",
    "TimeSformer",
    "Tracking",
    "Train",
    "Tube",
    "TubeSet",
    "ViT",
    "ViViT",
    "VideoMAE",
]


class Source(Labelled):
    """One stream of samples: which data set of which shards, and how its samples become tensors."""

    path: ShardFolder
    """Folder of shards with its manifest: a path, or an address (http, https, s3, gs)."""
    validation: ShardFolder | None = None
    """Folder of held-out shards with its manifest."""
    dataset: str | None = None
    """Data set inside mixed shards; by default the one named like the source, or the only one."""
    kind: Literal["video", "image"]
    """Whether a sample is a clip, or an image, which the models read as a clip of one frame."""
    size: Annotated[int, Field(gt=0, le=100_000)] = 224
    """Height and width in pixels to which every crop is resized."""
    clip: Clip | None = None
    """Which frames of a video make a sample; null for images."""
    still: Literal["random", "center"] | None = None
    """An image source may take a frame of each video of a video data set: a random one, or the middle."""
    augment: Augment = Augment()
    """Random crops, flips and colours in training."""
    repeats: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Views that a step has of each of its samples, from one decoding (Hoffer et al., 2020, "Augment your
    batch"): of `mixture` 512 and `repeats` 2 a step has 256 samples."""
    label_smoothing: Fraction = 0.0
    """Share of a label that is spread evenly over all classes (arXiv 1512.00567, §7); 0: none."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup's Beta distribution (arXiv 1710.09412, §2); 0 is off."""
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the source's mean loss in the sum over sources; 0: it is measured, and not learned from."""
    beton: Folder | None = None
    """Images: an FFCV file of these samples (`tubeworks data export-ffcv`), read in place of the shards."""
    validation_beton: Folder | None = None
    """The same for the held-out shards."""

    @model_validator(mode="after")
    def _clip_fits_kind(self) -> Source:
        if self.kind == "video" and self.clip is None:
            raise ValueError("a video source needs `clip: {frames: …, stride: … or fps: …}`")
        if self.kind == "image" and self.clip is not None:
            raise ValueError("an image source has no `clip`")
        if self.kind == "video" and self.still is not None:
            raise BrokenRule("makes images of videos: `kind` must be image", "still")
        if self.media == "video" and (self.beton or self.validation_beton):
            raise ValueError("FFCV files hold no video: `beton` is for sources of images")
        return self

    @property
    def media(self) -> Literal["video", "image"]:
        """What its data set holds."""
        return "video" if self.still else self.kind

    @property
    def frames(self) -> int:
        """Frames of one sample; an image is the one-frame case."""
        return self.clip.frames if self.clip else 1


class Data(Section):
    """The sources, and how many rows of each make one global step: samples, times their `repeats`."""

    sources: Annotated[dict[Name, Source], Field(min_length=1)]
    """The sources by name; one that is not in `mixture` has a classifier, and is never read."""
    mixture: Annotated[dict[Name, Few], Field(min_length=1)]
    """Rows of each source in a step, all ranks and micro-batches together."""
    block: Positive = 1024
    """Samples of a lane that are shuffled together (see `framework.data.plan`)."""
    workers: Annotated[int, Field(ge=0, le=1_000)] = 2
    """Processes per rank that decode; 0 decodes in the rank itself."""
    prefetch: Few = 2
    """Micro-batches that each worker prepares ahead."""
    decode_seconds: Annotated[float, Field(gt=0)] = DECODE_SECONDS
    """A worker that is at one stage of a sample for longer hangs: it is replaced, the sample tried again."""
    read_seconds: Annotated[float, Field(gt=0)] = READ_SECONDS
    """The same for reading, where it is the storage that hangs."""
    on_corrupt: Literal["stop", "substitute"] = "stop"
    """What to do with a sample whose checksum or decode fails; a substitute is fixed by the plan."""
    max_corrupt: NonNegative = 100
    """With `substitute`: stop all the same when an attempt finds more corrupt samples, on all ranks."""
    cache: Cache = Cache()
    """Where shards of remote stores are kept on a node."""

    @field_validator("mixture")  # of the field, so that it is looked at whatever else is wrong
    @classmethod
    def _mixture_names_sources(cls, mixture: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        sources = info.data.get("sources", mixture)  # not there where a source has errors of its own
        for name in mixture:
            if name not in sources:
                near = difflib.get_close_matches(name, sources, n=1)
                guess = f", did you mean `{near[0]}`?" if near else "."
                text = f"there is no such source{guess} Names in data.sources: {', '.join(sources)}"
                raise BrokenRule(text, name)
        return mixture

    @model_validator(mode="after")
    def _mixture_has_whole_samples(self) -> Data:
        for name, count in self.mixture.items():
            repeats = self.sources[name].repeats
            if count % repeats:
                near = " or ".join(str(n) for n in (count - count % repeats, count + -count % repeats) if n)
                text = (
                    f"is {count}, but each sample has {repeats} rows (data.sources.{name}.repeats): {near} "
                    "would do"
                )
                raise BrokenRule(text, "mixture", name)
        return self

    @property
    def repeats(self) -> dict[str, int]:
        """Rows that each sample of a source of the mixture has in a step."""
        return {name: self.sources[name].repeats for name in self.mixture}

    @property
    def samples(self) -> dict[str, int]:
        """Different samples of each source in one global step."""
        return {name: count // self.sources[name].repeats for name, count in self.mixture.items()}


class Train(Section):
    """Length and rhythm of training."""

    steps: Annotated[int, Field(gt=0, le=1_000_000_000)]
    """Steps of the whole run, interruptions or not; each takes the mixture and updates the weights once."""
    accumulation: Few = 1
    """Micro-batches per step and rank: the global batch is cut by ranks x accumulation."""
    activation_checkpointing: bool = False
    """Compute blocks again in the backward pass instead of keeping their activations: less memory for about
    a third more operations."""
    compile: bool = False
    """Compile the encoder's blocks (ZeRO 0 to 2); the first step then takes about a minute longer."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """d of the weights' moving average a, which after each update is d a + (1 - d) w; null: there is none.
    Evaluations during training take the weights w; `tubeworks eval`, `predict` and `export` the average."""
    log_every: Positive = 10
    """Steps between lines of the journal, the last step besides; `guards.collapse` and `.dead` look then."""
    eval_every: NonNegative = 0
    """Steps between evaluations on the held-out shards; 0: only at the end."""


class Optimizer(Section):
    """What moves the weights."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """AdamW (arXiv 1711.05101), Adam (arXiv 1412.6980), or stochastic gradient descent with momentum."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate at the end of the warm-up, which is the highest; `schedule` says the rest."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the averages of gradients and of their squares (Adam, Algorithm 1); sgd has none."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the averaged squares that updates are divided by (Adam, Algorithm 1); not sgd."""
    momentum: Fraction = 0.9
    """Decay of the sum of gradients that sgd steps along; 0: the gradient alone. Others do not look at it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled for adamw, added to the gradient for adam and sgd; not on vectors (biases, norms, class
    tokens, …), learned positions and the queries of poolings."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of all gradients together; larger ones are scaled down to it. null: left alone."""


class Schedule(Section):
    """The learning rate: linear warm-up to `optimizer.lr`, then what `name` says."""

    name: Literal["cosine", "constant"] = "cosine"
    """Half a cosine down to `final` (TubeViT Table 10), or the same rate to the end."""
    warmup: NonNegative = 0
    """Steps of linear warm-up; 0: none."""
    warmup_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs of the mixture's first source, instead of `warmup`."""
    final: Fraction = 0.0
    """Share of `optimizer.lr` at which the cosine ends; `constant` does not look at it."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Schedule:
        if self.warmup and self.warmup_epochs is not None:
            text = "is said beside `warmup_epochs`; leave one of them out (`null` or 0 unsets one of a base)"
            raise BrokenRule(text, "warmup")
        return self


class Engine(Section):
    """DeepSpeed: what is sharded over the ranks, and in which numbers it computes."""

    zero: Annotated[int, Field(ge=0, le=3)] = 1
    """Stage of ZeRO (arXiv 1910.02054, §5), what ranks share out: nothing (0), the optimizer's states (1),
    gradients too (2), parameters too (3)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Numbers of the forward and backward pass; the optimizer has weights and moments in fp32 either way."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep the optimizer's states (ZeRO-1 to 3), or also the parameters (ZeRO-3), in host memory."""
    bucket_mb: Few = 200
    """Largest piece in which gradients are summed over ranks, and with ZeRO-3 parameters fetched, in MiB of
    fp32 numbers. Without effect under ZeRO-0, and under ZeRO-1 in bf16 without offload."""

    @model_validator(mode="after")
    def _offload_needs_sharding(self) -> Engine:
        if self.offload == "all" and self.zero != 3:
            raise BrokenRule("all needs zero: 3 (only there are parameters sharded)", "offload")
        if self.offload == "optimizer" and self.zero == 0:
            raise BrokenRule("optimizer needs zero: 1, 2 or 3", "offload")
        if self.zero == 0 and self.precision == "bf16":
            raise ValueError(
                "zero: 0 is for fp32; bf16 takes zero: 1, which computes the same and costs less"
            )
        return self


class Evaluation(Section):
    """Views of a held-out sample and how many samples go through the model at once."""

    temporal_views: Few = 4
    """Clips of a video, spread evenly over it; an image has one. TubeViT's tables have 4 x 3 views."""
    spatial_views: Literal[1, 3] = 3
    """Square crops of a clip: the middle one, or three from one end of its long side to the other."""
    batch: Few = 16
    """Samples per forward pass and rank."""


class Tracking(Section):
    """The MLflow mirror of the journal."""

    mlflow: bool = True
    """Whether the journal is mirrored to MLflow; it is written in any case."""
    uri: str | None = None
    """Tracking server; null: `sqlite:///mlflow.db` beside the run folder (local disks only)."""
    experiment: str = "tubeworks"
    """Experiment of MLflow that the run belongs to; it is made where there is none of this name."""
    system_metrics: bool = True
    """Journal and mirror also have processor, memory, disk and accelerators of the first rank's node."""


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
    """Names the run in MLflow, and its folder in `runs` where `--run` names no other."""
    description: str = ""
    """One line for `tubeworks recipe list`, MLflow and the card of an exported model."""
    published: dict[str, str] = Field(default_factory=dict)
    """The result that the run should give, and where it was published."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides all that is random: first weights, order of samples, clips, crops, mixup, what is dropped."""
    model: ModelSection
    """What is built; `name` decides which keys there are."""
    init: Init | None = None
    """Where the weights of a new run come from; null: they are random."""
    data: Data
    """What is learned from."""
    optimizer: Optimizer
    """What moves the weights."""
    train: Train
    """How long, and how often it reports."""
    schedule: Schedule = Schedule()
    """How the learning rate changes."""
    engine: Engine = Engine()
    """How DeepSpeed computes it."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved, and what stays."""
    guards: Guards = Guards()
    """When a training that goes wrong ends by itself."""
    evaluation: Evaluation = Evaluation()
    """How held-out samples are looked at."""
    tracking: Tracking = Tracking()
    """What MLflow gets to see."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Recipe:
        if self.schedule.warmup >= self.train.steps and self.schedule.warmup > 0:
            text = f"must be smaller than train.steps ({self.train.steps}), not {self.schedule.warmup}"
            raise BrokenRule(text, "schedule", "warmup")
        return self

    @model_validator(mode="after")
    def _compile_fits(self) -> Recipe:
        if self.train.compile and self.engine.zero == 3:
            text = "does not go with engine.zero: 3, whose hooks inside every block break it into pieces"
            raise BrokenRule(text, "train", "compile")
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Recipe:
        check_best(self.checkpoint, self.train.log_every, self.train.eval_every)
        return self

    @model_validator(mode="after")
    def _scale_up_has_its_sources(self) -> Recipe:
        if self.model.scale_up is not None and self.init is None:
            text = "needs `init: {tubes: RUN, encoder: RUN}`: what is frozen must have been trained"
            raise BrokenRule(text, "model", "scale_up")
        if self.model.scale_up is None and self.init is not None and self.init.tubes is not None:
            raise BrokenRule("needs `model.scale_up`, which says what is made of them", "init", "tubes")
        return self
