"""What is said between the service and a scoring job: one request, then JSON lines back.

A request names models (a checkpoint, or checkpoints with weights that the job merges in memory,
one model at a time), sets of token blocks, and the numerics. The job writes one score record per
model and set of blocks into the records store and prints an event a line. The job is a process
of its own, so that its memory returns when it ends.
"""

from functools import cached_property
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ckptfuse.digests import digest

#: Raised where what is computed on such a device changes. 2: compiled layers.
PROTOCOL = {"cpu": 1, "cuda": 2}


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Numerics(Message):
    """How losses are computed. Those of different numerics are never compared."""

    dtype: Literal["float32", "bfloat16"]
    attention: str
    device_class: Literal["cpu", "cuda"]
    converter: str | None = None  # see conversion.identity
    engine: str | None = None  # scoring.command; None is our own scorer
    protocol: int = 1

    @cached_property
    def key(self) -> str:
        return digest(self.model_dump())


class Input(Message):
    """A checkpoint folder, and what it must be: by listing signature (cheap) or by its bytes."""

    uri: str
    signature: str | None = None
    fingerprint: str | None = None


class CheckpointModel(Message):
    kind: Literal["checkpoint"] = "checkpoint"
    input: Input


class MergeModel(Message):
    """A weighted merge of ``inputs`` (oldest first), made in memory; ``fusion`` is its id."""

    kind: Literal["merge"] = "merge"
    fusion: str
    inputs: tuple[Input, ...]
    weights: tuple[float, ...]
    dtype: str | None
    ancillary: Input
    copied: tuple[str, ...] = ()  # patterns of tensors that are not merged, beyond the usual
    converted: bool = False  # the inputs are what the converter makes


Model = Annotated[CheckpointModel | MergeModel, Field(discriminator="kind")]


class BlockSet(Message):
    """Token blocks in ``folder`` (see blocks.py), named by their digest."""

    folder: str
    digest: str
    split: str


class Reading(Message):
    """What the job's reads are held to, as its parent's are (see store/throttle.py)."""

    megabytes_per_second: float | None = None
    requests_per_second: float | None = None
    own: tuple[str, ...] = ()  # the service's own folders, which are read without a cap


class Request(Message):
    models: tuple[Model, ...]
    blocks: tuple[BlockSet, ...]
    numerics: Numerics
    records: str  # URI of the records store
    batch_tokens: int | None = None  # None: what suits the device
    threads: int | None = None
    split: bool = False  # spread each model's layers over the visible GPUs
    trust_remote_code: bool = False
    converter: str | None = None  # package.module:function, see conversion.py
    model: str | None = None  # folder with the config.json of what the converter makes
    reading: Reading = Reading()
    command: tuple[str, ...] = ()  # what scores in our scorer's place, see engines.py
    scratch: str | None = None  # a folder for what a job leaves and can be made again


class Read(Message):
    """A checkpoint was read in full: what its bytes are."""

    event: Literal["read"] = "read"
    model: int  # index into the request's models
    fingerprint: str
    architecture: str


class Scored(Message):
    """A model has all its score records; ``model_id`` is its fingerprint or fusion id."""

    event: Literal["scored"] = "scored"
    model: int
    model_id: str
    seconds: float
    tokens: int  # predicted in this job; 0 when every record was there


class Failed(Message):
    """One model could not be scored; the job goes on with the next."""

    event: Literal["failed"] = "failed"
    model: int
    error: Literal["non-finite", "damaged", "changed", "other"]
    reason: str
    checkpoint: str | None = None  # URI of the culprit, where one input of a merge is to blame


class Progress(Message):
    event: Literal["progress"] = "progress"
    model: int
    done: int  # blocks
    total: int


class Notice(Message):
    """Something that a person should know, such as a batch that was too large for the device."""

    event: Literal["notice"] = "notice"
    model: int
    text: str


Event = Annotated[Read | Scored | Failed | Progress | Notice, Field(discriminator="event")]


class EngineRequest(Message):
    """What ``scoring.command`` is asked: the losses of one model on sets of token blocks."""

    model: str  # folder or s3:// prefix
    blocks: tuple[BlockSet, ...]
    numerics: Numerics
    batch_tokens: int | None = None
    threads: int | None = None


class EngineAnswer(BaseModel):
    """Keys that are not ours are the engine's own affair."""

    model_config = ConfigDict(frozen=True)


class EngineLosses(EngineAnswer):
    """Its answer for one set of blocks: the summed negative log-likelihood of each, nats."""

    event: Literal["losses"] = "losses"
    blocks: str  # the set's digest
    nll: tuple[float, ...]


class EngineFailed(EngineAnswer):
    event: Literal["failed"] = "failed"
    reason: str


def score_key(*, model_id: str, blocks: str, numerics: Numerics) -> str:
    """Key of a score record: what was measured, on what, and how."""
    return digest([model_id, blocks, numerics.key])
