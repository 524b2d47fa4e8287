"""params.yaml as typed values: every knob of the service, in one file.

A value comes from, in this order: the environment (``CKPTFUSE_BUCKET``,
``CKPTFUSE_GATE__MINIMUM_GAIN``; params_environment), ``params.yaml`` (params_file), the default
below. An unknown key is an error that names it; an empty text stands for none, and an empty section
for its defaults. The first sections are the science: they decide bytes and verdicts, are pinned
with every fusion and are what DVC tracks (``SCIENTIFIC``). The others are operations.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ckptfuse.cut import Cut
from ckptfuse.devices import visible_gpus
from ckptfuse.digests import digest
from ckptfuse.errors import ConfigurationError
from ckptfuse.names import check_pattern
from ckptfuse.params_environment import DELIMITER, PREFIX
from ckptfuse.store.throttle import Limits

PARAMS_FILE = "params.yaml"

_DAY = 24 * 3600.0


def is_plain(name: str, *, also: str = "") -> bool:
    """Whether it can name files, metrics and deployments; ``also``: what it may hold besides."""
    return re.fullmatch(rf"\w[\w{re.escape(also)}-]*", name) is not None


def _without_empty(model: type[BaseModel], values: object) -> object:
    """A section whose keys are all commented out is its defaults; an empty text is none."""
    if not isinstance(values, dict):
        return values
    fields = model.model_fields
    return {k: v for k, v in values.items() if k not in fields or not _empty(fields[k], v)}


def _empty(field: FieldInfo, value: object) -> bool:
    wanted = field.annotation
    if isinstance(value, str):
        return not value.strip() and type(None) in get_args(wanted)
    holds_more = isinstance(wanted, type) and issubclass(wanted, BaseModel)
    return value is None and (holds_more or get_origin(wanted) in (dict, tuple))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_given(cls, values: object) -> object:
        return _without_empty(cls, values)


class Shares(Section):
    """Parts of the documents that go to each split; normalised to 1."""

    selection: float = Field(default=0.25, gt=0)
    audit: float = Field(default=0.5, gt=0)
    report: float = Field(default=0.25, gt=0)


class Budget(Section):
    """Most tokens per domain in each split."""

    selection: int = Field(default=32_768, gt=0)
    audit: int = Field(default=131_072, gt=0)
    report: int = Field(default=65_536, gt=0)


class DomainBudget(Section):
    """A domain's own budgets; None: that of all domains."""

    selection: int | None = Field(default=None, gt=0)
    audit: int | None = Field(default=None, gt=0)
    report: int | None = Field(default=None, gt=0)


class Domain(Section):
    """One kind of target text: its file or folder, and its share in the target.

    ``field`` names the text in JSON lines, and the column in Parquet.
    """

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, ge=0)
    field: str = "text"
    tokens: DomainBudget = DomainBudget()


class CorpusParams(Section):
    domains: dict[str, Domain] = Field(default_factory=dict)
    salt: str = "ckptfuse"
    shares: Shares = Shares()
    tokens: Budget = Budget()
    tokens_per_document: int = Field(default=4_096, gt=0)
    seed: int = 0
    tokenizer: str | None = None

    @field_validator("domains")
    @classmethod
    def _domain_names_are_plain(cls, domains: dict[str, Domain]) -> dict[str, Domain]:
        for name in domains:
            if not is_plain(name):
                raise ValueError(
                    f"domain {name!r}: letters, digits, '-' and '_' make a name, '-' not first"
                )
        if domains and not any(domain.weight for domain in domains.values()):
            raise ValueError("every domain has weight 0; at least one must count")
        return domains

    @classmethod
    def of(cls, paths: Mapping[str, str], *, field: str = "text") -> "CorpusParams":
        """Domains that were named by hand; raises ConfigurationError where one cannot be."""
        try:
            domains = {n: Domain(path=path, field=field) for n, path in paths.items()}
            return cls(domains=domains)
        except ValidationError as error:
            problems = "; ".join(problem["msg"] for problem in error.errors())
            raise ConfigurationError(f"corpus {dict(paths)}: {problems}") from error

    def budget(self, domain: str) -> Budget:
        """Most tokens of a domain in each split."""
        own = self.domains[domain].tokens.model_dump(exclude_none=True)
        return self.tokens.model_copy(update=own)


class ScoringParams(Section):
    block_length: int = Field(default=1_024, ge=2)
    layout: Literal["packed", "rolling"] = "packed"
    stride: int | None = None
    bos: Literal["document", "none"] = "document"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["sdpa", "eager"] = "sdpa"
    batch_tokens: int | None = Field(default=None, gt=0)
    threads: int | None = Field(default=None, gt=0, le=4_096)  # more, and torch fails in the job
    gpus_per_job: int = Field(default=1, ge=1)
    trust_remote_code: bool = False
    converter: str | None = None
    model: str | None = None
    command: tuple[str, ...] = ()
    every: int = Field(default=1, ge=1)
    hours_per_day: float | None = Field(default=None, gt=0)

    @property
    def device_class(self) -> str:
        """What ``auto`` comes to on this machine."""
        if self.device != "auto":
            return self.device
        return "cuda" if visible_gpus() else "cpu"

    @property
    def cut(self) -> Cut:
        return Cut(self.block_length, layout=self.layout, stride=self.stride, bos=self.bos)

    @model_validator(mode="after")
    def _blocks_can_be_cut(self) -> "ScoringParams":
        try:
            _ = self.cut
        except ConfigurationError as error:  # pydantic adds the key only to a ValueError
            raise ValueError(str(error)) from error
        return self


class WindowParams(Section):
    """A checkpoint belongs to a window if every limit that is set lets it in."""

    size: int = Field(default=8, ge=2)
    minimum: int = Field(default=3, ge=2)
    span_steps: int | None = Field(default=None, gt=0)
    span_tokens: float | None = Field(default=None, gt=0)
    tokens_per_step: float | None = Field(default=None, gt=0)
    spacing: int = Field(default=0, ge=0)
    boundaries: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _minimum_fits(self) -> "WindowParams":
        if self.minimum > self.size:
            raise ValueError(f"minimum {self.minimum} exceeds size {self.size}")
        return self


class RuleParams(Section):
    name: str = "calibrated"
    options: dict[str, JsonValue] = Field(default_factory=dict)  # checked by the rule's signature


class FuseParams(Section):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    copied: tuple[str, ...] = ()
    strict: bool = False
    shards: int = Field(default=1, ge=1)


class GateParams(Section):
    alpha: float = Field(default=0.05, gt=0, lt=1)
    minimum_gain: float = Field(default=0.002, ge=0)
    domain_tolerance: float = Field(default=0.01, ge=0)


class VetoParams(Section):
    """A command that answers items with a model, and how sure it must be that answers got worse."""

    command: tuple[str, ...] = ()
    alpha: float = Field(default=0.05, gt=0, lt=1)


class PromotionParams(Section):
    minimum_gain: float = Field(default=0.0, ge=0)
    spacing: int = Field(default=0, ge=0)
    veto: VetoParams = VetoParams()


class WatchParams(Section):
    interval_seconds: float = Field(default=60.0, gt=0, le=366 * _DAY)  # sleep() has an end
    settle_seconds: float = Field(default=30.0, ge=0)
    marker: str | None = None
    pattern: str | None = None

    @field_validator("pattern")
    @classmethod
    def _pattern_finds_a_step(cls, pattern: str | None) -> str | None:
        try:
            return pattern and check_pattern(pattern)
        except ConfigurationError as error:  # pydantic adds the key only to a ValueError
            raise ValueError(str(error)) from error


class ReadingParams(Section):
    """The most that all reads of the trainer's storage together may take of it."""

    megabytes_per_second: float | None = Field(default=None, gt=0)
    requests_per_second: float | None = Field(default=None, gt=0)

    def limits(self) -> Limits:
        return Limits(self.megabytes_per_second, self.requests_per_second)


class MlflowParams(Section):
    """``artifact_root``: where a new experiment's artifacts go; None: where the server says."""

    tracking_uri: str | None = None
    artifact_root: str | None = None
    model: str | None = None


class LedgerParams(Section):
    """Where the ledger is pushed to: commits and tags by Git, text and weights by DVC."""

    remote: str | None = None
    dvc_remote: str | None = None

    @field_validator("dvc_remote")
    @classmethod
    def _dvc_remote_is_public(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).password is not None:
            raise ValueError(
                "a password in it would be committed, and be in every clone; give DVC's store its "
                "credentials in the environment or in files of its own"
            )
        return url


class VersionsParams(Section):
    """What of a published fusion is kept, beside the model that consumers load.

    ``weights``: the ledger's DVC cache holds them, or their hashes alone. ``inputs``: the
    checkpoints that a kept fusion was made of are held, without their optimizer state.
    """

    weights: Literal["cache", "manifest"] = "cache"
    inputs: Literal["none", "held"] = "none"


class RetentionParams(Section):
    """Which published fusions stay; see ckptfuse/retention.py for those that always do."""

    last: int | None = Field(default=None, ge=1)
    every: int | None = Field(default=None, ge=1)
    keep: tuple[str, ...] = ()


class Params(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
    )
    SCIENTIFIC: ClassVar = ("trajectory", "corpus", "scoring", "window", "rule", "fuse", "gate")
    #: How, and how much of it, is carried out; not what comes out.
    HOST_ONLY: ClassVar = {
        "scoring": {"batch_tokens", "threads", "gpus_per_job", "model", "every", "hours_per_day"},
        "fuse": {"shards"},
    }

    trajectory: str = "trajectory"
    corpus: CorpusParams = CorpusParams()
    scoring: ScoringParams = ScoringParams()
    window: WindowParams = WindowParams()
    rule: RuleParams = RuleParams()
    fuse: FuseParams = FuseParams()
    gate: GateParams = GateParams()
    promotion: PromotionParams = PromotionParams()

    bucket: str | None = None
    workspace: str = Field(default="workspace", min_length=1)
    execution: Literal["inline", "deployments"] = "inline"
    watch: WatchParams = WatchParams()
    reading: ReadingParams = ReadingParams()
    mlflow: MlflowParams = MlflowParams()
    ledger: LedgerParams = LedgerParams()
    versions: VersionsParams = VersionsParams()
    retention: RetentionParams = RetentionParams()

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_given(cls, values: object) -> object:
        return _without_empty(cls, values)

    @field_validator("trajectory")
    @classmethod
    def _trajectory_is_a_plain_name(cls, name: str) -> str:
        if not is_plain(name, also="."):
            raise ValueError(
                f"{name!r}: letters, digits, '-', '_' and '.' make a name, '-' and '.' not first"
            )
        return name

    @model_validator(mode="after")
    def _shards_are_of_files(self) -> "Params":
        if self.fuse.shards > 1 and self.scoring.model is not None:
            raise ValueError("fuse.shards: with scoring.model a merge is made whole, and converted")
        return self

    @field_validator("workspace")
    @classmethod
    def _workspace_is_a_folder(cls, uri: str) -> str:
        if "://" in uri:
            raise ValueError(f"{uri!r}: the workspace is a local or mounted folder")
        return uri

    @model_validator(mode="after")
    def _device_is_the_same_everywhere(self) -> "Params":
        """``auto`` is what this machine has, and numerics are part of a score's identity."""
        if self.execution == "deployments" and self.scoring.device == "auto":
            raise ValueError(
                "scoring.device must be cuda or cpu with execution: deployments, since the "
                "machine that plans need not have the devices of those that score"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings

    def scientific(self) -> dict[str, Any]:
        """What decides weights, bytes and verdicts, as plain values."""
        return self.model_dump(mode="json", include=set(self.SCIENTIFIC), exclude=self.HOST_ONLY)

    def scientific_digest(self) -> str:
        """Digest of the science, without where the text lies (its content has its own digest).

        ``device: auto`` and the device that it comes to are the same science: a service goes from
        ``execution: inline`` to ``deployments``, which wants it named, without deciding anew.
        """
        values = self.scientific()
        values["scoring"]["device"] = self.scoring.device_class
        for domain in values["corpus"]["domains"].values():
            del domain["path"], domain["field"]
        return digest(values)

    @property
    def model_name(self) -> str:
        """The registered model's name."""
        return self.mlflow.model or self.trajectory
