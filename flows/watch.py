"""Watch the bucket: a short, stateless run that lists, compares with the records, acts and ends.

It can run any number of times, be killed anywhere and be started again; a second one beside it
finds the lock taken and leaves the work to the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prefect import flow

from ckptfuse.errors import CkptfuseError, PublicationError
from ckptfuse.listing import Listed, Listing
from ckptfuse.looks import Pending
from ckptfuse.plan import Actions, Fuse, State
from ckptfuse.records import GateRecord, PromotionRecord, SkipRecord
from ckptfuse.service import Service, plans_of
from ckptfuse.steps.look import discover, load_state, look_file, next_actions
from ckptfuse.steps.survey import known_survey
from ckptfuse.window import window_key
from flows.fuse import fuse, publish_window
from flows.opening import open_flow, start_server
from tasks import news
from tasks.aliases import is_settled, settle_champion
from tasks.discover import quarantine, skip, survey_corpus
from tasks.log import log
from tasks.prune import is_pruned, prune
from tasks.publish import curves_are_drawn, draw_curves
from tasks.score import score_checkpoints
from tasks.showing import name_run, show_fusions

_SHOWN = 4  # checkpoints that a run's name names

#: What follows whatever a look did and settled: how it is known that it was done, and how it is.
_AFTERWARDS: tuple[tuple[Callable[[Service], bool], Callable[[Service], None]], ...] = (
    (curves_are_drawn, draw_curves),
    (is_pruned, prune),
)


@dataclass
class Summary:
    """What one watch run did."""

    busy: bool = False  # another process holds the workspace
    complete: int = 0
    incomplete: int = 0
    scored: int = 0
    quarantined: int = 0
    skipped: int = 0
    held: tuple[Pending, ...] = ()  # could not be read or scored
    verdicts: list[GateRecord] = field(default_factory=list)
    published: int = 0
    settled: list[PromotionRecord] = field(default_factory=list)  # of candidates that had waited
    waiting: frozenset[str] = frozenset()  # windows whose publication waits for the next run
    delayed: str | None = None  # why the last of them does

    @classmethod
    def of(cls, listing: Listing) -> "Summary":
        """Of a look that has done nothing yet."""
        return cls(
            complete=len(listing.complete),
            incomplete=len(listing.incomplete),
            held=tuple(Pending.of(r.checkpoint, r.reason) for r in listing.unread),
        )

    def delay(self, window: str, step: int, error: CkptfuseError) -> None:
        self.waiting |= {window}
        self.delayed = f"step {step}: {error}"
        log.warning("publication waits for the next run: %s", self.delayed)

    @property
    def did_nothing(self) -> bool:
        found = (self.scored, self.quarantined, self.skipped)
        return not any((*found, self.verdicts, self.published, self.settled))


def look(params_file: str) -> Summary:
    """What ``watch`` does, and a flow run only where there is something to do.

    A service looks every minute, for months, and finds nothing most of the time: such looks leave
    nothing in Prefect's database, which forgets no run, and need no server.
    """
    service = open_flow(params_file)
    with service.workspace.lock() as mine:
        if not mine:
            return _busy()
        listing, _, actions = _begin(service, live=True, first=None, last=None)
        if not actions and _is_all_done(service, listing):
            return _end(service, listing, actions, Summary.of(listing))
    start_server()
    return watch(params_file)


@flow(name="watch", flow_run_name="watch", persist_result=False)
def watch(
    params_file: str, live: bool = True, first: int | None = None, last: int | None = None
) -> Summary:
    """One look at the bucket, at steps ``first`` to ``last``, and everything that follows."""
    service = open_flow(params_file)
    with service.workspace.lock() as mine:
        if not mine:
            return _busy()
        return _look(service, params_file, live, first, last)


def _busy() -> Summary:
    log.info("another process is at work on this workspace; nothing done")
    return Summary(busy=True)


def _look(
    service: Service, params_file: str, live: bool, first: int | None, last: int | None
) -> Summary:
    listing, state, actions = _begin(service, live=live, first=first, last=last)
    if known_survey(service) is None:
        survey_corpus(service)
    summary = Summary.of(listing)
    while actions:
        try:
            _act(service, params_file, state, actions, summary)
        except _Outdated:
            log.warning("parameters or text were changed during this look; the next goes by them")
            break
        held = frozenset(item.signature for item in summary.held)
        state = load_state(service, held, summary.waiting)
        actions = next_actions(service, listing, state, live=live)
    # Whatever this look did: the one before may have been killed on its way here.
    if not is_settled(service):
        summary.settled += settle_champion(service)
    for is_done, finish in _AFTERWARDS:
        if not is_done(service):
            finish(service)
    if live:
        news.stalled(service, listing)
    _end(service, listing, actions, summary)
    if not summary.did_nothing:
        show_fusions(service)
        name_run(_outcome(summary, listing))
    return summary


def _begin(
    service: Service, *, live: bool, first: int | None, last: int | None
) -> tuple[Listing, State, Actions]:
    look_file(service).begin()
    listed, state = discover(service)
    listing = listed.between(first, last)
    news.incomplete(service, listing)
    return listing, state, next_actions(service, listing, state, live=live)


def _is_all_done(service: Service, listing: Listing) -> bool:
    return (
        known_survey(service) is not None
        and is_settled(service)
        and all(is_done(service) for is_done, _ in _AFTERWARDS)
        and news.untold_stall(service, listing) is None  # Prefect's automations are to hear of it
    )


def _end(service: Service, listing: Listing, left: Actions, summary: Summary) -> Summary:
    for note in left.notes:
        log.info(note)
    for refused in listing.unread:
        log.warning("%s could not be read now: %s", refused.checkpoint.name, refused.reason)
    look_file(service).end(held=summary.held, waits=summary.delayed)
    return summary


def _outcome(summary: Summary, listing: Listing) -> str:
    """A name that tells of the run in a list of hundreds."""
    newest = max((one.step for one in listing.complete), default=0)
    counts = {
        "scored": summary.scored,
        "published": summary.published,
        "declined": sum(1 for verdict in summary.verdicts if verdict.verdict == "declined"),
        "skipped": summary.skipped,
        "quarantined": summary.quarantined,
        "settled": len(summary.settled),
    }
    done = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"watch to step {newest}: {done}"


def _act(
    service: Service, params_file: str, state: State, actions: Actions, summary: Summary
) -> None:
    for damaged in actions.quarantine:
        quarantine(service, damaged)
        summary.quarantined += 1
    if actions.score:
        unscored = score_checkpoints(service, actions.score, _names(actions.score))
        held = [item for item in unscored if not item.quarantined]
        summary.held += tuple(Pending.of(item.checkpoint, item.reason) for item in held)
        summary.quarantined += len(unscored) - len(held)
        summary.scored += len(actions.score) - len(unscored)
    for key in actions.publish:
        try:
            publish_window(service, plans_of(service)[key], state.gates[key])
            summary.published += 1
        except CkptfuseError as error:  # its server is down, or what it was made of is gone
            summary.delay(key, state.gates[key].step, error)
    for superseded in actions.skip:
        skip(service, superseded)
        summary.skipped += 1
    for item in actions.fuse:
        _check_current(params_file, item)
        members = [member.signature for member in item.window.members]
        try:
            verdict = fuse(params_file, item.key, item.window.step, members)
        except PublicationError as error:
            summary.delay(item.key, item.window.step, error)
            continue
        if verdict is None:  # plan again: without the damaged checkpoint, or on from the window
            is_skipped = service.records.has(SkipRecord, item.key)
            summary.skipped += is_skipped
            summary.quarantined += not is_skipped
            return
        summary.verdicts.append(verdict)
        summary.published += verdict.verdict == "publish"


class _Outdated(Exception):
    """What a look was to do follows from parameters or text that are no longer there."""


def _check_current(params_file: str, item: Fuse) -> None:
    """`fuse` reads the parameters anew: a window must be decided by those that asked for it."""
    now = open_flow(params_file)
    science, corpus = now.params.scientific_digest(), now.scorer.corpus_digest()
    if window_key(item.window.newest, science, corpus) != item.key:
        raise _Outdated


def _names(checkpoints: Sequence[Listed]) -> str:
    names = [checkpoint.name for checkpoint in checkpoints]
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{names[0]} to {names[-1]} ({len(names)} checkpoints)"
