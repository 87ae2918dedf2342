"""The recipe: everything that `genssl run` needs to know, in one flat YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from genssl.config.address import check_target_address
from genssl.config.base import BUCKETS, Buckets, ComponentConfig, Kind, Section
from genssl.config.views import AugmentationConfig as AugmentationConfig
from genssl.config.views import ViewsConfig as ViewsConfig


class TrainConfig(Section):
    """Length, batch and device of a run, how it computes, and what it saves."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2, description="images in an optimiser step, over all ranks and micro-batches")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="torch threads of the trainer")
    workers: int = Field(
        0, ge=0, le=256, description="processes that decode images, for data sets of large files; 0: threads do it"
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="above 0: this part of the train split is held out and evaluated instead of the test split",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the forward pass (autocast); weights stay fp32, and fp16 scales its gradients"
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="micro-batches an optimiser step; each has a loss of its own, so a contrastive loss has only the "
        "micro-batch's negatives, and batch norm its statistics",
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="gradients are scaled down to this norm")
    channels_last: bool = Field(False, description="memory order of images and convolutions; faster with tensor cores")
    compile: bool = Field(False, description="torch.compile the backbone; the first step takes a minute")
    checkpoint_every_epochs: int = Field(1, ge=1)
    checkpoint_every_steps: int | None = Field(None, ge=1, description="besides those at the end of epochs")
    keep_checkpoints: int = Field(1, ge=1, description="how many of the latest stay; the best one stays as well")
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="besides metrics.jsonl and metrics.csv, which are always written"
    )

    @field_validator("accumulate")
    @classmethod
    def _parts_of_equal_size(cls, value: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size")
        if batch_size is not None and (batch_size % value or batch_size // value < 2):
            raise ValueError(
                f"train.batch_size {batch_size} does not divide into {value} micro-batches of equal size and at least "
                "2 images"
            )
        return value


class MonitorConfig(Section):
    """What is measured of the representation while the training goes on; the test split is never used.

    Images are from the held-out part of train if there is one (train.validation_fraction), else from train itself; the
    bank is from train, without them.
    """

    images: int = Field(256, ge=8, description="on which spread and effective rank are measured after every epoch")
    knn_every_epochs: int | None = Field(
        None, ge=1, description="every so many epochs the images are classified by their neighbours in the bank"
    )
    bank: int = Field(2048, ge=8, description="labelled images of train that are neighbours, at most")
    queries: int = Field(512, ge=8, description="labelled images that are classified, at most")
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)


LATENESS = "variants.late, variants.refresh and variants.budget"
NARROWEST_IN_CHANNELS_LAST = 8


class ClientTLSConfig(Section):
    """How a client checks the server, and, for mTLS, proves who it is."""

    ca: Path = Field(description="PEM; the server must show a certificate signed by one of these")
    certificate: Path | None = Field(None, description="PEM; the client's own, if the server asks for one")
    key: Path | None = None

    @field_validator("key")
    @classmethod
    def _both_or_none(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if (value is None) != (info.data.get("certificate") is None):
            raise ValueError("`certificate` and `key` belong together; give both or neither")
        return value


class RefreshConfig(Section):
    """Keeps generating into the pool at low priority while training goes on."""

    budget: int = Field(
        ge=1, description="variants asked for per training step beyond those the step needs, of coming epochs' indices"
    )


class VariantsConfig(Section):
    """Where variants come from, how far ahead they are asked for, and what a step does when one is late."""

    source: Literal["online", "in_process", "stored", "none"] = "online"
    store: Path | None = Field(
        None,
        description="a folder of stored variants; stored: all come from it; online, in_process: what is in it is not "
        "made again, and what is made is written to it",
    )
    missing: Literal["fail", "generate", "real"] = Field(
        "fail",
        description="source: stored: for a variant that the store lacks: end before the training; make it in this "
        "process and store it; take the image itself",
    )
    server: str | Annotated[list[str], Field(min_length=1)] = Field(
        "embedded", description="embedded, host:port, unix:/path, or a list of servers that share the work"
    )
    token_file: Path | None = Field(None, description="a file with the bearer token that the server wants")
    tls: ClientTLSConfig | None = None
    per_image: Literal["fresh"] | Annotated[int, Field(ge=1)] = Field(
        "fresh", description="fresh: a new variant each time; K: one of the indices 0..K-1 (the paper's 10)"
    )
    batching: Literal["dynamic", "deterministic"] = Field(
        "dynamic", description="deterministic: embedded and in-process generation pad every batch to the last bucket"
    )
    late: Literal["block", "reuse", "real"] = Field(
        "block",
        description="for a variant that is not there yet: wait; take another variant of the same image (the image "
        "itself if there is none); take the image itself",
    )
    max_reuse: int = Field(10, ge=1, description="late: reuse: how often one variant may stand in for others")
    max_age_steps: int | None = Field(
        None, ge=1, description="late: reuse: a variant older than so many steps does not stand in for others"
    )
    pool_bytes: int = Field(
        2**30, ge=2**20, description="late: reuse: received variants kept on disk; the oldest make room"
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="late: reuse: variants of each image that the run generates at most, spread over its epochs; other "
        "variants of the image stand in for the rest",
    )
    refresh: RefreshConfig | None = None
    replay: Path | None = Field(
        None, description="assignments.jsonl of an earlier run, whose variants are used again slot by slot"
    )
    prefetch_steps: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        "auto", description="how many steps ahead variants are requested; auto: from measured latency and step time"
    )
    prefetch_bytes: int = Field(
        256 * 2**20, ge=2**10, description="variants under way or waiting to be taken, at most, in bytes"
    )
    rows_per_request: int = Field(64, ge=1, le=4096)
    max_in_flight: int = Field(4, ge=1, le=64, description="requests under way at once")
    buckets: Buckets = Field(
        BUCKETS, description="batch sizes of the generator, embedded or in process; lower the last if memory is short"
    )
    deadline_seconds: float = Field(
        60.0, gt=0, description="how long a variant may keep the training waiting before the run ends"
    )

    @field_validator("store")
    @classmethod
    def _stored_needs_a_store(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is None and info.data.get("source") == "stored":
            raise ValueError(
                "variants.source is 'stored' but there is no variants.store; give the folder that "
                "`genssl pregenerate RECIPE --store DIR` made"
            )
        return value

    @field_validator("server")
    @classmethod
    def _addresses(cls, value: str | list[str]) -> str | list[str]:
        for address in [value] if isinstance(value, str) else value:
            if value != "embedded":
                check_target_address(address)
        return value

    @property
    def targets(self) -> list[str]:
        """Addresses of the servers; empty when the server is embedded."""
        if self.server == "embedded":
            return []
        return [self.server] if isinstance(self.server, str) else list(self.server)


class OptimizerConfig(Section):
    """SGD with momentum, AdamW, or LARS. `lr_rule: linear` multiplies lr by batch_size / 256."""

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: float = Field(gt=0)
    lr_rule: Literal["none", "linear"] = "none"
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD and LARS")
    trust_coefficient: float = Field(0.02, gt=0, description="LARS: eta")
    clip: bool = Field(True, description="LARS: no layer's rate exceeds lr; solo-learn's clip_lr")


class ScheduleConfig(Section):
    """Linear warm-up to the peak learning rate, then half a cosine to zero, per optimiser step.

    Convention: with W warm-up steps of T, step t has the factor (t + 1) / W for t < W, and
    (1 + cos(pi (t - W) / (T - W))) / 2 from there on.
    """

    name: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0)


class Recipe(Section):
    """One training run."""

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**31)
    dataset: Annotated[SerializeAsAny[ComponentConfig], Kind("datasets")]
    method: Annotated[SerializeAsAny[ComponentConfig], Kind("methods")]
    backbone: Annotated[SerializeAsAny[ComponentConfig], Kind("backbones")]
    views: ViewsConfig = ViewsConfig()
    generator: Annotated[SerializeAsAny[ComponentConfig] | None, Kind("generators")] = None
    variants: VariantsConfig = VariantsConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    monitor: MonitorConfig = MonitorConfig()
    evaluate: Annotated[list[SerializeAsAny[ComponentConfig]], Kind("evaluators")] = Field(default_factory=list)

    # Rules between sections stand on the later section's field, not on the model: they then take part in the one report
    # of all problems, and each has the line of its section.

    @field_validator("variants")
    @classmethod
    def _a_source_needs_a_generator(cls, value: VariantsConfig, info: ValidationInfo) -> VariantsConfig:
        if value.source != "none" and info.data.get("generator", value) is None:
            raise ValueError(
                f"variants.source is {value.source!r} but there is no generator block; "
                "add one, or set variants.source: none"
            )
        return value

    @field_validator("train")
    @classmethod
    def _warmup_fits(cls, value: TrainConfig, info: ValidationInfo) -> TrainConfig:
        schedule = info.data.get("schedule")
        if schedule is not None and schedule.warmup_epochs >= value.epochs:
            raise ValueError(
                f"schedule.warmup_epochs is {schedule.warmup_epochs:g} but train.epochs is {value.epochs}; "
                "warm-up must be shorter"
            )
        return value

    @field_validator("train")
    @classmethod
    def _wide_enough_for_the_memory_order(cls, value: TrainConfig, info: ValidationInfo) -> TrainConfig:
        """torch 2.14 writes past the end of strided 1x1 convolutions of fewer channels on CPUs without AVX-512."""
        width = getattr(info.data.get("backbone"), "width", NARROWEST_IN_CHANNELS_LAST)
        if width < NARROWEST_IN_CHANNELS_LAST and (value.channels_last or value.compile):
            setting = "channels_last" if value.channels_last else "compile"  # what is compiled has that order too
            raise ValueError(
                f"train.{setting} needs backbone.width {NARROWEST_IN_CHANNELS_LAST} or more, found {width}; narrower "
                f"convolutions crash torch on some CPUs: widen the backbone, or set train.{setting}: false"
            )
        return value

    @field_validator("evaluate")
    @classmethod
    def _each_evaluator_once(cls, value: list[ComponentConfig]) -> list[ComponentConfig]:
        names = [config.name for config in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"more than one block names {', '.join(twice)}; their results would overwrite each other")
        return value

    def warnings(self) -> list[str]:
        """Returns settings that are allowed but rarely meant."""
        found = []
        if self.variants.source != "none" and not self.uses_variants():
            found.append(
                "no view can be a variant (views.policy or views.probability says so); no generator is started"
            )
        found += self.views.of_no_effect()
        if self.uses_variants() and self.views.policy == "both" and self.views.probability == 1:
            found.append(
                "both views of every pair are variants; the paper's sweep loses 6 points that way (figure 4): "
                "lower views.probability to 0.5"
            )
        if self.uses_variants():
            found += self._of_no_effect()
            found += [f"generator.{warning}" for warning in (self.generator.warnings() if self.generator else [])]
            found += [unsuited] if (unsuited := self.unsuited()) else []
        return found

    def _of_no_effect(self) -> list[str]:
        variants, found = self.variants, []
        late = variants.late
        lateness = late != "block" or variants.refresh is not None or variants.budget is not None
        if variants.source != "online" and lateness:
            found.append(f"{LATENESS} have no effect: with variants.source {variants.source} no variant is late")
        elif variants.replay is not None and lateness:
            found.append(f"{LATENESS} have no effect: a replay waits for what its log names")
        elif variants.budget is not None and late != "reuse":
            found.append(
                f"variants.budget has no effect: only variants.late: reuse does with fewer variants (late is {late})"
            )
        elif variants.refresh is not None and late != "reuse":
            found.append(
                f"variants.refresh has no effect: only variants.late: reuse keeps what it generates (late is {late})"
            )
        if variants.missing != "fail" and variants.source != "stored":
            found.append(
                f"variants.missing has no effect: with variants.source {variants.source} every variant can be made"
            )
        if variants.batching == "deterministic" and self.train.threads == "auto" and self.train.device != "cuda":
            found.append(
                "variants.batching: deterministic gives equal bits on a CPU only with an equal number of threads: "
                "set train.threads"
            )
        return found

    def unsuited(self) -> str | None:
        """Says why the generator is not for the data set; None if nothing speaks against it."""
        return self.generator.unsuited_to(self.dataset.name) if self.generator is not None else None

    def uses_variants(self) -> bool:
        """Says whether any view can be a variant under this recipe."""
        return self.variants.source != "none" and self.views.policy != "none" and self.variant_probability() > 0

    def views_per_pair(self) -> float:
        """Returns how many variants a step wants of each of its images, on average."""
        return self.views.variant_slots * self.variant_probability()

    def variant_probability(self) -> float:
        """Returns the probability that a slot which may hold a variant does."""
        if self.views.policy != "added":
            return self.views.probability
        made = 1 if self.variants.per_image == "fresh" else self.variants.per_image
        return made / (made + self.views.real_weight)
