"""Fuse one window: weights -> merge -> score -> gate -> ledger -> registry."""

from prefect import flow
from prefect.futures import wait

from ckptfuse.digests import digest
from ckptfuse.errors import CkptfuseError, ConfigurationError, NonFiniteValues, RuleError
from ckptfuse.listing import Listing
from ckptfuse.plan import Fuse, Quarantine, Skip, State
from ckptfuse.records import (
    GateRecord,
    PlanRecord,
    PublicationRecord,
    SkipRecord,
)
from ckptfuse.service import Service, plans_of
from ckptfuse.steps import merge
from ckptfuse.steps.look import discover
from ckptfuse.steps.weigh import plan_key
from ckptfuse.window import Window, window_key, windows
from flows.opening import open_flow
from tasks.deployments import Attempts, Piece, hand_over
from tasks.discover import quarantine, skip
from tasks.fuse import decide_weights, judge_fusion, merge_fusion, merge_shard, review_weights
from tasks.ledger import tag_of
from tasks.log import log
from tasks.merged import bring_back
from tasks.publish import publish
from tasks.score import score_fusion
from tasks.version import commit_fusion
from tasks.workers import Handed

#: Most fusions that a rule may have made of one window before it stands by its weights.
MAX_REVIEWS = 8


@flow(name="fuse", flow_run_name="fuse step {step}", persist_result=False)
def fuse(params_file: str, window: str, step: int, members: list[str]) -> GateRecord | None:
    """Take one window through to its verdict and, if the gate passes, its publication.

    ``members`` are the signatures of the window's checkpoints, oldest first. None when the merge
    is not finite: a damaged checkpoint is quarantined then, and the window skipped without one.
    """
    service = open_flow(params_file)
    known = service.checkpoints()
    item = Fuse(window, Window(tuple(known[signature] for signature in members)))
    try:
        decided = _decided(service, item)
        verdict = judge_fusion(service, decided)
    except NonFiniteValues as error:
        _set_aside(service, item, error)
        return None
    if verdict.verdict == "publish":
        publish_window(service, decided, verdict)
    return verdict


def _decided(service: Service, item: Fuse) -> PlanRecord:
    """The plan that its rule stands by once it knows the fusion's loss; merged and scored."""
    decided = decide_weights(service, item)
    for _ in range(MAX_REVIEWS):
        if not decided.is_merge:
            return decided
        merge_window(service, decided)
        score_fusion(service, decided)
        reviewed = review_weights(service, item, decided)
        if reviewed.fusion == decided.fusion:
            return reviewed
        decided = reviewed
    raise RuleError(f"rule {decided.rule!r} changed its weights {MAX_REVIEWS} times")


def merge_window(service: Service, decided: PlanRecord) -> None:
    """Make the fusion's folder and record; with ``fuse.shards`` each shard is merged first.

    What a shard could not do is left to the last task, which does it or tells why not.
    """
    shards = range(service.params.fuse.shards)
    if len(shards) > 1 and merge.merged(service, decided) is None:
        if service.params.execution == "deployments":
            _hand_over_shards(service, decided, shards)
        else:
            wait([merge_shard.submit(service, decided, shard) for shard in shards])
    merge_fusion(service, decided)


def _hand_over_shards(service: Service, decided: PlanRecord, shards: range) -> None:
    """Each shard to whichever worker is free."""
    key = plan_key(decided)
    pieces = [
        Piece(
            digest([key, shard, len(shards)]),
            f"merge step {decided.step}, shard {shard} of {len(shards)}",
            {"plan": key, "shard": shard},
        )
        for shard in shards
    ]
    attempts = Attempts(Handed(service.workspace.folder("cache")).store)
    for failure in hand_over(f"merge-shard/{service.params.trajectory}", pieces, attempts).values():
        log.warning("a shard is merged here instead: %s", failure)


def _set_aside(service: Service, item: Fuse, error: NonFiniteValues) -> None:
    """Quarantine the member that is to blame, so that the window is planned without it."""
    blamed = [m for m in item.window.members if error.checkpoint in (m.name, m.uri)]
    for member in blamed:
        quarantine(service, Quarantine(member, None, str(error)))
    if not blamed:  # the merge itself overflows: to try again would not help
        skip(service, Skip(item.key, item.window.step, str(error)))


def publish_window(service: Service, decided: PlanRecord, verdict: GateRecord) -> PublicationRecord:
    """Everything after the verdict, in the order of publication; repeats nothing that is done."""
    bring_back(service, decided.fusion, tag_of(decided))
    merge_window(service, decided)
    entry = commit_fusion(service, decided, verdict)
    return publish(service, decided, verdict, entry)


@flow(name="fuse-step", flow_run_name="fuse by hand", persist_result=False)
def fuse_step(params_file: str, step: int | None = None) -> GateRecord:
    """Fuse the window that ends at ``step`` (the newest without one), from recorded scores.

    One that is decided keeps its verdict. Raises ConfigurationError when there is no such window.
    """
    service = open_flow(params_file)
    with service.workspace.lock() as mine:
        if not mine:
            raise CkptfuseError("another process is at work on this workspace; try again later")
        listing, state = discover(service)
        item = _find_window(service, listing, state, step)
        known = state.gates.get(item.key)
        if known is not None:
            if not state.is_closed(item.key):
                publish_window(service, plans_of(service)[item.key], known)
            return known
        members = [member.signature for member in item.window.members]
        verdict = fuse(params_file, item.key, item.window.step, members)
        skipped = service.records.get(SkipRecord, item.key)
    if verdict is None:
        why = skipped.reason if skipped else "a checkpoint of the window is damaged"
        raise CkptfuseError(f"step {item.window.step}: {why}")
    return verdict


def _find_window(service: Service, listing: Listing, state: State, step: int | None) -> Fuse:
    healthy = [
        state.checkpoints[checkpoint.signature]
        for checkpoint in listing.complete
        if checkpoint.signature in state.scored and checkpoint.signature not in state.quarantined
    ]
    known = state.checkpoints.values()
    found = windows(healthy, service.params.window, known=known)
    found = [window for window in found if step in (None, window.step)]
    if not found:
        steps = ", ".join(str(record.step) for record in healthy) or "none"
        raise ConfigurationError(
            f"no window of at least {service.params.window.minimum} scored checkpoints ends at "
            f"{'any step' if step is None else f'step {step}'}; scored are: {steps}. "
            "`ckptfuse watch --once` scores what is new"
        )
    newest = found[-1]
    key = window_key(newest.newest, service.params.scientific_digest(), state.corpus)
    return Fuse(key, newest)
