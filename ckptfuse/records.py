"""Records: small immutable JSON documents in the workspace, the only state there is.

Here are their kinds; `record_files.py` writes and reads them. No record holds a time of its making.
"""

from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from ckptfuse import __version__

SCHEMA = 1


class Record(BaseModel):
    """Base of all kinds. ``code`` is the version of ckptfuse that made it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str]
    schema_version: int = SCHEMA
    code: str = __version__


class CheckpointRecord(Record):
    """What the first full read of a checkpoint found; keyed by its listing signature."""

    kind: ClassVar = "checkpoint"
    name: str
    uri: str
    step: int
    stage: str | None
    tokens: int | None
    modified: float
    size: int
    signature: str
    fingerprint: str
    architecture: str
    tokenizer: str  # digest of what it was first scored with
    own_tokenizer: str | None = None  # of what lies in it; None of earlier versions, or without one
    segment: str
    generation: int


class DomainScore(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    loss: float  # nats per token
    standard_error: float | None  # None when a single document stands behind it
    perplexity: float | None  # None when exp(loss) exceeds float64
    bits_per_byte: float | None
    tokens: int
    bytes: int
    documents: int


class ScoreRecord(Record):
    """One model on one split; keyed by model, blocks and numerics. Arrays: losses per block."""

    kind: ClassVar = "score"
    model: str  # a checkpoint's fingerprint or a fusion's id
    blocks: str
    split: str
    numerics: str
    batch_tokens: int
    compiled: bool = False  # whether full batches went through compiled layers
    domains: dict[str, DomainScore]


class SplitContents(BaseModel):
    """``near_duplicates``: of these documents, those that have one in the split that is named."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    documents: int
    bytes: int
    near_duplicates: dict[str, int]


class PlacedDocument(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    domain: str
    split: str
    digest: str  # SHA-256 of the text
    beginning: str


class NearDuplicates(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    similarity: float
    one: PlacedDocument
    other: PlacedDocument


class CorpusRecord(Record):
    """What the corpus holds, by domain and split; keyed by its digest."""

    kind: ClassVar = "corpus"
    corpus: str
    domains: dict[str, dict[str, SplitContents]]
    examples: list[NearDuplicates]


class Member(BaseModel):
    """One checkpoint of a window and the weight it was given."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    uri: str
    step: int
    signature: str
    fingerprint: str
    weight: float
    loss: float  # target loss on selection, nats
    weight_error: float | None = None  # standard error, where the rule knows one
    spike: float | None = None  # nats above the trajectory's trend, where it leaves it


class MergeLoss(BaseModel):
    """A merge of a window that was measured on selection: what was expected, what was found."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weights: list[float]  # of the window's members
    predicted: float | None  # None where the rule had expected nothing
    loss: float
    standard_error: float | None  # of loss - predicted: the text's and the rule's own


class PlanRecord(Record):
    """What the rule made of a window; keyed by window, fusion and revision.

    Once the fusion itself is measured on selection the rule is asked again: the next revision says
    how far its prediction held, and may have other weights.
    """

    kind: ClassVar = "plan"
    window: str
    step: int
    rule: str
    tokenizer: str
    members: list[Member]
    ancillary: str  # fingerprint of the checkpoint that config and tokenizer come from
    dtype: str | None
    fusion: str
    notes: dict[str, float]
    params: str
    revision: int = 0
    merges: list[MergeLoss] = []
    remarks: list[str] = []
    no_gain: str | None = None  # why nothing is worth merging, where the rule says so

    @property
    def is_merge(self) -> bool:
        """Whether there is something to merge."""
        return self.no_gain is None and sum(1 for member in self.members if member.weight) > 1

    @property
    def is_final(self) -> bool:
        """Whether the rule has seen what its weights are worth."""
        weights = [member.weight for member in self.members]
        return not self.is_merge or any(merge.weights == weights for merge in self.merges)


class FusionRecord(Record):
    """A merged model: complete in the workspace, if it is still there; keyed by the fusion id."""

    model_config = ConfigDict(extra="ignore", frozen=True)  # once it said in which folder
    kind: ClassVar = "fusion"
    fusion: str
    step: int
    size: int
    files: dict[str, tuple[int, str]]  # path -> size, content hash

    @property
    def sizes(self) -> dict[str, int]:
        """Path -> bytes."""
        return {path: size for path, (size, _) in self.files.items()}


class DomainGain(BaseModel):
    """How much lower a fusion's loss is in one domain, in nats; negative where it is higher."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    gain: float
    standard_error: float | None  # None when a single document stands behind it


class Comparison(BaseModel):
    """The fusion against one single checkpoint, on audit. Gains are positive when it is better."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    against: Literal["best", "newest"]
    name: str
    step: int
    fingerprint: str
    gain: float
    standard_error: float | None
    lower_bound: float | None
    documents: int
    domains: dict[str, DomainGain]


class GateRecord(Record):
    """The verdict on one window's fusion."""

    kind: ClassVar = "gate"
    window: str
    fusion: str
    step: int
    verdict: Literal["publish", "declined"]
    reason: str
    test: int  # ordinal of this test in the trajectory; 0 where nothing was tested
    alpha: float  # the chance to err that it had
    comparisons: list[Comparison]


class VetoRecord(Record):
    """What the veto's command found of one model; keyed by model and command.

    Arrays, of each item [N]: ``item``, its name, and ``correct``, whether the model answered it.
    """

    kind: ClassVar = "veto"
    model: str  # a fusion's id
    command: list[str]
    items: int
    correct: int


class VetoOutcome(BaseModel):
    """A fusion's answers against the champion's, item by item."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    against: str  # the champion's fusion id
    items: int  # that both were asked
    won: int  # answered by the fusion alone
    lost: int  # answered by the champion alone
    p_value: float  # one-sided, exact: so many lost, were winning and losing equally likely


class PromotionRecord(Record):
    """Whether a published fusion became the champion, and why.

    The service's own decisions are keyed by the fusion id, those by hand by their number.
    """

    kind: ClassVar = "promotion"
    fusion: str
    step: int
    number: int  # of this decision in the trajectory; the champion is the last one promoted
    promoted: bool
    reason: str
    by: str | None = None  # who decided by hand, user@host; None: the service
    undoes: int | None = None  # the promotion that a rollback takes back
    veto: VetoOutcome | None = None  # where a command compared it with the champion


class PublicationRecord(Record):
    """Where a fusion was published; written when every step of publication is done."""

    kind: ClassVar = "publication"
    fusion: str
    window: str
    step: int
    tag: str
    commit: str
    weights_hash: str
    model_name: str
    version: str


class SkipRecord(Record):
    """A window that is not fused, and why; keyed by the window."""

    kind: ClassVar = "skip"
    window: str
    step: int
    reason: str


class PassRecord(Record):
    """A checkpoint that ``scoring.every`` left without a score; keyed by its listing signature."""

    kind: ClassVar = "pass"
    name: str
    step: int
    stage: str | None
    signature: str


class QuarantineRecord(Record):
    """A checkpoint that must not be used, and why; keyed by its listing signature."""

    kind: ClassVar = "quarantine"
    name: str
    uri: str
    step: int
    stage: str | None = None
    signature: str
    architecture: str | None
    reason: str


class PruneRecord(Record):
    """Merged weights that were deleted from the workspace, and why; keyed by the fusion id."""

    kind: ClassVar = "prune"
    fusion: str
    folder: str
    reason: str


class RetirementRecord(Record):
    """A published fusion that retention deletes from registry and DVC cache, and why.

    Keyed by the fusion id; written before anything is deleted. Its tag, commit and run stay.
    """

    kind: ClassVar = "retirement"
    fusion: str
    step: int
    tag: str
    version: str
    reason: str


AnyRecord = TypeVar("AnyRecord", bound=Record)
