"""Look: what is in the bucket, what do the records say, what is to be done?"""

import time
from concurrent.futures import ThreadPoolExecutor

from ckptfuse import checkpoints, remembered
from ckptfuse.listing import Conventions, Listed, Listing, find, look_again
from ckptfuse.looks import LookFile
from ckptfuse.plan import Actions, Quarantine, Skip, State, plan
from ckptfuse.records import (
    GateRecord,
    PassRecord,
    PublicationRecord,
    QuarantineRecord,
    RetirementRecord,
    SkipRecord,
)
from ckptfuse.service import Service
from ckptfuse.store import open_store


def discover(service: Service) -> tuple[Listing, State]:
    """List the bucket, and read the records meanwhile.

    Headers are read only of checkpoints that no record remembers. Of a bucket with very many, most
    looks list few (remembered.py).
    """
    watch = service.params.watch
    bucket = open_store(checkpoints.check_bucket_uri(service.params.bucket))
    file = service.workspace.folder("cache") / "listing.json"
    last = remembered.load(file)
    with ThreadPoolExecutor(1) as ahead:
        names = ahead.submit(bucket.folders) if last.is_usable else None
        state = load_state(service)
    known: dict[str, Listed] = {**state.checkpoints, **state.quarantined}
    conventions = Conventions(watch.pattern, watch.marker, watch.settle_seconds, known)
    if names is None:
        found, at = find(bucket, conventions), time.time()
    else:
        there = {n: known[signature] for n, signature in last.signatures.items()
                 if signature in known}  # fmt: skip
        recent = service.params.window.size * service.params.scoring.every
        found, at = look_again(bucket, names.result(), conventions, there, recent), last.at
    now = remembered.remember(found, at)
    if now != last:
        now.save(file)
    return found, state


def load_state(
    service: Service,
    held: frozenset[str] = frozenset(),
    delayed: frozenset[str] = frozenset(),
) -> State:
    """What the records say now; checkpoints ``held``, windows ``delayed`` are left alone now."""
    records, scorer = service.records, service.scorer
    known = service.checkpoints()
    return State(
        corpus=scorer.corpus_digest(),
        checkpoints=known,
        scored=scorer.scored_among(known.values()),
        held=held,
        delayed=delayed,
        passed=records.all(PassRecord),
        affordable=scorer.affordable(),
        quarantined=records.all(QuarantineRecord),
        gates={gate.window: gate for gate in records.all(GateRecord).values()},
        skips=records.all(SkipRecord),
        publications={p.window: p for p in records.all(PublicationRecord).values()},
        retired=records.keys(RetirementRecord),
    )


def look_file(service: Service) -> LookFile:
    return LookFile(service.workspace.folder("cache"))


def next_actions(service: Service, listing: Listing, state: State, *, live: bool) -> Actions:
    """Decide, tell monitoring what waits, and remember what is passed over."""
    actions = plan(listing, state, service.params, live=live)
    for one in actions.passed:
        record = PassRecord(name=one.name, step=one.step, stage=one.stage, signature=one.signature)
        service.records.put(one.signature, record)
    scorer = service.scorer
    given = scorer.given_tokenizer
    look_file(service).found(
        listing,
        actions.due,
        corpus=state.corpus,
        tokenizer=given.digest if given else None,
        numerics=scorer.numerics,
    )
    return actions


def quarantine(service: Service, item: Quarantine) -> None:
    checkpoint = item.checkpoint
    record = QuarantineRecord(
        name=checkpoint.name,
        uri=checkpoint.uri,
        step=checkpoint.step,
        stage=checkpoint.stage,
        signature=checkpoint.signature,
        architecture=item.architecture,
        reason=item.reason,
    )
    service.records.put(checkpoint.signature, record)


def skip(service: Service, item: Skip) -> None:
    service.records.put(
        item.window, SkipRecord(window=item.window, step=item.step, reason=item.reason)
    )
