"""The stages of dvc.yaml: the pipeline's own steps, run from files in a ledger.

Each stage works on a workspace of its own that it throws away, so it computes afresh whatever the
service remembers; what passes from stage to stage are the files that DVC sees.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckptfuse.checkpoints import Checkpoint, open_checkpoint
from ckptfuse.errors import (
    ChangedCheckpoint,
    CkptfuseError,
    ConfigurationError,
    IncompleteCheckpoint,
    MissingFile,
    StoreError,
)
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.gate import Share
from ckptfuse.params_loading import load_params
from ckptfuse.protocol import CheckpointModel, Input
from ckptfuse.records import CheckpointRecord, Member, PlanRecord
from ckptfuse.score_files import export_scores, import_scores
from ckptfuse.service import Service
from ckptfuse.steps.judge import verdict_on
from ckptfuse.steps.merge import make_fusion
from ckptfuse.steps.score import score_fusion
from ckptfuse.steps.weigh import spec_of, weigh
from ckptfuse.store import remove_folder, throttle
from ckptfuse.window import Window
from ckptfuse.workspace import Workspace
from tasks.ledger_files import DECISION, MODEL, SCORES, write_decision, write_metrics
from tasks.window_file import WindowFile, read_window_file

_DVC = Path(".dvc")
#: Tokenised text, by its digest: the first stage makes it for all. DVC keeps tmp/ out of Git.
_CACHE = _DVC / "tmp" / "ckptfuse"
#: Largest change of a weight between the pinned decision and the one derived again.
WEIGHT_TOLERANCE = 0.02

_ELSEWHERE = (
    "The registry has the merged weights as they were published, and `dvc pull` fetches them where "
    "DVC has more than their hashes; CKPTFUSE_BUCKET names the place where the checkpoints lie now"
)


@contextmanager
def _bench() -> Iterator[tuple[Service, WindowFile, PlanRecord]]:
    params = load_params()
    window = read_window_file(Path())
    with tempfile.TemporaryDirectory(prefix="ckptfuse-stage-") as folder:
        workspace = Workspace(Path(folder))
        if _DVC.is_dir():
            _CACHE.mkdir(parents=True, exist_ok=True)
            (workspace.root / "cache").symlink_to(_CACHE.resolve())
        throttle.configure(params.reading.limits(), own=[workspace.root, MODEL])
        yield Service(params, workspace), window, window.plan(dtype=params.fuse.dtype)


def score(key: str) -> None:
    """``scores/<key>.npz``: one checkpoint on every split."""
    with _bench() as (service, window, _):
        if key not in window.checkpoints:
            raise ConfigurationError(f"window.yaml has no checkpoint {key!r}")
        pinned = window.plan(dtype=None).members[list(window.checkpoints).index(key)]
        _open_source(pinned)
        source = service.scorer.tokenizer(pinned.uri)
        model = CheckpointModel(input=Input(uri=pinned.uri))
        (answer,) = service.scorer.score([model], source)
        if answer.failed is not None:
            raise CkptfuseError(answer.failed.reason)
        _check_fingerprint(pinned, answer.fingerprint)
        export_scores(service.scorer, pinned.fingerprint, source.digest, SCORES / f"{key}.npz")


def decide() -> None:
    """``decision.json``: the pinned weights, once fresh scores lead to the same ones."""
    with _bench() as (service, window, pinned):
        _import_all(service, window)
        members = tuple(_checkpoint_record(member, window) for member in pinned.members)
        source = service.scorer.tokenizer(members[-1].uri)
        weights = weigh(service, Window(members), source).answer.weights
        if _first_that_differs(pinned, weights) is not None:  # the rule may have corrected itself
            settled = weigh(service, Window(members), source, to_the_end=True)
            weights = settled.answer.weights
    strays = _first_that_differs(pinned, weights)
    if strays is not None:
        member, weight = strays
        raise CkptfuseError(
            f"step {member.step}: the weight derived again is {weight:.4f}, pinned is "
            f"{member.weight:.4f}; more than {WEIGHT_TOLERANCE} apart. Another corpus, another "
            "rule, or numerics that differ from those of the service?"
        )
    write_decision(pinned, Path())


def _first_that_differs(
    pinned: PlanRecord, weights: Sequence[float]
) -> tuple[Member, float] | None:
    pairs = zip(pinned.members, weights, strict=True)
    return next((pair for pair in pairs if abs(pair[0].weight - pair[1]) > WEIGHT_TOLERANCE), None)


def fuse() -> None:
    """``model/``: the merge with the pinned weights."""
    with _bench() as (service, _, pinned):
        weights = json.loads(DECISION.read_text())["weights"]
        newest = pinned.members[-1]
        needed = [m for m in pinned.members if weights[f"step{m.step}"] or m is newest]
        spec = spec_of(service, needed, [weights[f"step{m.step}"] for m in needed])
        opened = [_open_pinned(member) for member in needed]
        remove_folder(MODEL)
        make_fusion(service, spec, opened, MODEL)


def evaluate_stage() -> None:
    """``metrics.json`` and ``losses.csv``: the gate and the figures on report text."""
    with _bench() as (service, window, pinned):
        _import_all(service, window)
        source = service.scorer.tokenizer(str(MODEL.resolve()))
        on_files = pinned.model_copy(update={"tokenizer": source.digest})
        score_fusion(service, on_files, MODEL.resolve())
        share = Share(window.fusion.gate_test, window.fusion.gate_alpha)
        verdict = verdict_on(service, on_files, share=share)
        write_metrics(service, on_files, verdict, Path())


def _import_all(service: Service, window: WindowFile) -> None:
    for key in window.checkpoints:
        import_scores(service.records, SCORES / f"{key}.npz")


def _open_source(member: Member) -> Checkpoint:
    """A checkpoint of the window; an error says which one is not there any more."""
    try:
        return open_checkpoint(member.uri)
    except (StoreError, IncompleteCheckpoint) as error:
        raise MissingFile(
            f"the checkpoint of step {member.step} is not at {member.uri} any more: {error}. "
            f"{_ELSEWHERE}"
        ) from error


def _open_pinned(member: Member) -> Checkpoint:
    checkpoint = _open_source(member)
    _check_fingerprint(member, fingerprint_of(checkpoint))
    return checkpoint


def _check_fingerprint(member: Member, found: str | None) -> None:
    if found != member.fingerprint:
        raise ChangedCheckpoint(
            f"the checkpoint of step {member.step} at {member.uri} was written again since: its "
            f"bytes have fingerprint {str(found)[:16]}, pinned is {member.fingerprint[:16]}. "
            f"{_ELSEWHERE}"
        )


def _checkpoint_record(member: Member, window: WindowFile) -> CheckpointRecord:
    opened = _open_source(member)
    return CheckpointRecord(
        name=member.name,
        uri=member.uri,
        step=member.step,
        stage=opened.stage,
        tokens=opened.tokens,
        modified=opened.modified,
        size=opened.size,
        signature=opened.signature,
        fingerprint=member.fingerprint,
        architecture="",
        tokenizer=window.fusion.tokenizer,
        segment="",
        generation=1,
    )
