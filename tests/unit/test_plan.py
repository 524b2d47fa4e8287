"""plan() and windows: what is to be done follows from the listing and the records, and ends."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfuse.checkpoints import Checkpoint, Listing, Refused
from ckptfuse.params import Params, WindowParams
from ckptfuse.plan import Actions, State, plan
from ckptfuse.records import (
    CheckpointRecord,
    GateRecord,
    PublicationRecord,
    QuarantineRecord,
    SkipRecord,
)
from ckptfuse.store import Entry
from ckptfuse.window import generation_of, window_key, windows
from tests.helpers import checkpoint_record

PARAMS = Params(window=WindowParams(size=3, minimum=2))


def checkpoint(step: int, *, modified: float | None = None) -> Checkpoint:
    entry = Entry("model.safetensors", 100, str(step), modified or float(step))
    return Checkpoint(f"step{step}", f"/bucket/step{step}", step, None, None, (entry,))


def record_of(item: Checkpoint, **changes: object) -> CheckpointRecord:
    return checkpoint_record(item.step, signature=item.signature, **changes)


def listing(*steps: int, **others: Any) -> Listing:
    found = tuple(checkpoint(step) for step in steps)
    usual = dict.fromkeys((item.signature for item in found), "usual")
    return replace(Listing(complete=found, architectures=usual), **others)


def scored(seen: Listing, **others: Any) -> State:
    """All checkpoints of a listing have their scores."""
    records = {item.signature: record_of(item) for item in seen.complete}
    return replace(State("corpus", checkpoints=records, scored=frozenset(records)), **others)


def gate(window: str, step: int, verdict: str) -> GateRecord:
    return GateRecord.model_validate(
        {"window": window, "fusion": f"fusion-{step}", "step": step, "verdict": verdict,
         "reason": "", "test": 1, "alpha": 0.01, "comparisons": []}
    )  # fmt: skip


def carry_out(seen: Listing, state: State, actions: Actions, verdict: str) -> State:
    """The records after these actions, when every gate answers ``verdict``."""
    quarantined = {
        item.checkpoint.signature: QuarantineRecord(
            name="", uri="", step=0, signature=item.checkpoint.signature,
            architecture=item.architecture, reason=item.reason,
        )
        for item in actions.quarantine
    }  # fmt: skip
    read = {item.signature: record_of(item) for item in actions.score}
    skips = {s.window: SkipRecord(window=s.window, step=s.step, reason="") for s in actions.skip}
    gates = {item.key: gate(item.key, item.window.step, verdict) for item in actions.fuse}
    published = {
        key: PublicationRecord(
            fusion="", window=key, step=0, tag="", commit="", weights_hash="", model_name="",
            version="1", champion=True,
        )
        for key in actions.publish
    }  # fmt: skip
    return replace(
        state,
        quarantined={**state.quarantined, **quarantined},
        checkpoints={**state.checkpoints, **read},
        scored=state.scored | read.keys(),
        skips={**state.skips, **skips},
        gates={**state.gates, **gates},
        publications={**state.publications, **published},
    )


@given(
    steps=st.lists(st.integers(1, 40), unique=True, max_size=9),
    live=st.booleans(),
    verdict=st.sampled_from(["publish", "declined"]),
)
@settings(max_examples=80, deadline=None)
def test_doing_what_is_planned_ends_with_nothing_to_do(
    steps: list[int], live: bool, verdict: str
) -> None:
    seen, state = listing(*steps), State("corpus")
    for _ in range(6):
        actions = plan(seen, state, PARAMS, live=live)
        if not actions:
            break
        state = carry_out(seen, state, actions, verdict)
    assert not plan(seen, state, PARAMS, live=live)
    assert state.scored == {item.signature for item in seen.complete}


@given(steps=st.permutations([10, 20, 30, 40, 50]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_order_of_listing_and_records_does_not_matter(steps: list[int], seed: int) -> None:
    state = scored(listing(*steps))
    shuffled = list(state.checkpoints.items())
    random.Random(seed).shuffle(shuffled)
    again = replace(state, checkpoints=dict(shuffled))
    assert plan(listing(*steps), again, PARAMS) == plan(listing(10, 20, 30, 40, 50), state, PARAMS)


def test_everything_is_scored_before_anything_is_fused() -> None:
    seen = listing(10, 20, 30)
    state = replace(scored(seen), scored=frozenset({checkpoint(10).signature}))
    actions = plan(seen, state, PARAMS)
    assert [item.step for item in actions.score] == [20, 30]
    assert not actions.fuse


def test_live_only_the_newest_window_is_fused_and_the_others_are_superseded() -> None:
    seen = listing(10, 20, 30, 40)
    actions = plan(seen, scored(seen), PARAMS)
    assert [item.window.step for item in actions.fuse] == [40]
    assert [item.step for item in actions.fuse[0].window.members] == [20, 30, 40]
    assert [(skip.step, skip.reason) for skip in actions.skip] == [
        (20, "superseded by step 40"), (30, "superseded by step 40"),
    ]  # fmt: skip


def test_a_backfill_fuses_every_window_in_the_order_of_training() -> None:
    seen = listing(10, 20, 30, 40)
    actions = plan(seen, scored(seen), PARAMS, live=False)
    assert [item.window.step for item in actions.fuse] == [20, 30, 40]
    assert not actions.skip


def test_fewer_checkpoints_than_the_minimum_make_no_window() -> None:
    seen = listing(10)
    assert not plan(seen, scored(seen), PARAMS)


def test_a_fusion_whose_gate_said_publish_is_published_before_new_ones_are_made() -> None:
    seen = listing(10, 20, 30)
    state = scored(seen)
    (first,) = plan(listing(10, 20), state, PARAMS).fuse
    state = replace(state, gates={first.key: gate(first.key, 20, "publish")})
    actions = plan(seen, state, PARAMS)
    assert actions.publish == (first.key,)
    assert [item.window.step for item in actions.fuse] == [30]
    assert not actions.skip


def test_a_checkpoint_that_the_trainer_deleted_reopens_no_decision() -> None:
    seen = listing(10, 20, 30)
    state = scored(seen)
    (fused,) = plan(seen, state, PARAMS).fuse
    state = replace(
        state,
        gates={fused.key: gate(fused.key, 30, "declined")},
        skips={s.window: SkipRecord(window=s.window, step=s.step, reason="")
               for s in plan(seen, state, PARAMS).skip},
    )  # fmt: skip
    assert not plan(listing(20, 30), state, PARAMS)


def test_another_science_or_corpus_decides_afresh() -> None:
    seen = listing(10, 20)
    (before,) = plan(seen, scored(seen), PARAMS).fuse
    (corpus,) = plan(seen, replace(scored(seen), corpus="another"), PARAMS).fuse
    stricter = PARAMS.model_copy(
        update={"gate": PARAMS.gate.model_copy(update={"minimum_gain": 0.5})}
    )
    (science,) = plan(seen, scored(seen), stricter).fuse
    assert len({before.key, corpus.key, science.key}) == 3


def test_what_could_not_be_read_just_now_is_left_alone_in_this_run() -> None:
    seen = listing(10, 20, 30)
    state = replace(scored(seen), held=frozenset({checkpoint(30).signature}), scored=frozenset())
    assert [item.step for item in plan(seen, state, PARAMS).score] == [10, 20]


def test_a_quarantined_checkpoint_is_in_no_window() -> None:
    seen = listing(10, 20, 30)
    aside = QuarantineRecord(
        name="step30", uri="", step=30, signature=checkpoint(30).signature, architecture=None,
        reason="NaN",
    )  # fmt: skip
    actions = plan(seen, scored(seen, quarantined={aside.signature: aside}), PARAMS)
    assert [item.window.step for item in actions.fuse] == [20]


def test_damage_is_quarantined_once_with_its_reason() -> None:
    damaged = checkpoint(40)
    seen = listing(10, 20, damaged=(Refused(damaged, "the header is damaged"),))
    (item,) = plan(seen, scored(seen), PARAMS).quarantine
    assert (item.checkpoint, item.reason) == (damaged, "the header is damaged")
    state = carry_out(seen, scored(seen), Actions(quarantine=(item,)), "declined")
    assert not plan(seen, state, PARAMS).quarantine


def test_another_model_in_the_bucket_is_quarantined_against_the_majority() -> None:
    seen = listing(10, 20, 30)
    odd = checkpoint(20).signature
    seen = replace(seen, architectures={**seen.architectures, odd: "other"})
    (item,) = plan(seen, State("corpus"), PARAMS).quarantine
    assert (item.checkpoint.step, item.architecture) == (20, "other")
    assert "another model in the same bucket" in item.reason


def test_one_against_one_is_no_majority_and_both_are_scored() -> None:
    seen = listing(10, 20)
    seen = replace(seen, architectures={**seen.architectures, checkpoint(20).signature: "other"})
    actions = plan(seen, State("corpus"), PARAMS)
    assert not actions.quarantine
    assert len(actions.score) == 2


def steps_of(records: list[CheckpointRecord], **params: Any) -> list[list[int]]:
    chosen = WindowParams(**{"size": 8, "minimum": 1 + 1, **params})
    return [[member.step for member in window.members] for window in windows(records, chosen)]


def test_windows_slide_over_the_newest_checkpoints() -> None:
    records = [checkpoint_record(step) for step in (30, 10, 20, 40)]
    assert steps_of(records, size=3) == [[10, 20], [10, 20, 30], [20, 30, 40]]


def test_a_window_never_spans_two_segments() -> None:
    records = [checkpoint_record(step, segment="one" if step < 30 else "two")
               for step in (10, 20, 30, 40)]  # fmt: skip
    assert steps_of(records) == [[10, 20], [30, 40]]


def test_a_declared_boundary_opens_a_segment() -> None:
    records = [checkpoint_record(step) for step in (10, 20, 30, 40)]
    assert steps_of(records, boundaries=(25,)) == [[10, 20], [30, 40]]
    assert steps_of(records, boundaries=(30,)) == [[10, 20], [30, 40]]


def test_after_a_rollback_higher_steps_of_the_old_generation_are_no_ancestors() -> None:
    records = [
        *[checkpoint_record(step) for step in (10, 20, 30, 40)],
        *[checkpoint_record(step, generation=2, fingerprint=f"again{step}") for step in (30, 40)],
    ]
    newest = windows(records, WindowParams(size=8, minimum=2))[-1]
    assert [(m.step, m.generation) for m in newest.members] == [(10, 1), (20, 1), (30, 2), (40, 2)]


@pytest.mark.parametrize(
    ("step", "modified", "fingerprint", "generation"),
    [
        (50, 50.0, "new", 1),  # goes on
        (20, 50.0, "new", 2),  # written again after 40: rolled back
        (40, 50.0, "new", 2),  # overwritten
        (20, 50.0, "f20", 1),  # the same bytes, copied or touched
        (25, 25.0, "new", 1),  # found late, written in its turn
    ],
)
def test_a_generation_is_decided_by_steps_and_times(
    step: int, modified: float, fingerprint: str, generation: int
) -> None:
    known = [checkpoint_record(known_step) for known_step in (10, 20, 30, 40)]
    found = generation_of(checkpoint(step, modified=modified), fingerprint, known)
    assert found == generation


def test_a_window_is_known_by_its_newest_checkpoint() -> None:
    newest = checkpoint_record(30)
    moved = checkpoint_record(30, uri="/elsewhere/step30", signature="s", modified=9.0)
    assert window_key(newest, "science", "corpus") == window_key(moved, "science", "corpus")
