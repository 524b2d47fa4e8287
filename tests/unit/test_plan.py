"""plan(): what is to be done follows from listing and records, whoever asks and how often."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.listing import Listing, Refused
from ckptfuse.params import Params
from ckptfuse.plan import Actions, State, plan
from ckptfuse.records import (
    CheckpointRecord,
    GateRecord,
    PassRecord,
    PublicationRecord,
    QuarantineRecord,
    SkipRecord,
)
from ckptfuse.store import Entry
from ckptfuse.window import generation_of
from tests.helpers import checkpoint_record

PARAMS = Params.model_validate({"window": {"size": 3, "minimum": 2}})


@dataclass
class World:
    """A bucket and the records of a service that carries out what plan() says."""

    listing: Listing = field(default_factory=Listing)
    state: State = field(default_factory=lambda: State(corpus="text"))

    def land(self, step: int, *, name: str = "", content: str = "", architecture: str = "usual",
             segment: str = "one", clock: float | None = None) -> Checkpoint:  # fmt: skip
        """Let a checkpoint appear in the bucket (over one of its name), written at ``clock``."""
        moment = clock if clock is not None else 1000.0 + len(self.listing.complete)
        name = name or f"step{step}"
        content = content or f"{step}-{segment}-{architecture}"
        file = Entry("model.safetensors", 100, f"{content}|{segment}|{moment}", moment)
        landed = Checkpoint(name, f"/bucket/{name}", step, None, None, (file,))
        others = [c for c in self.listing.complete if c.name != name]
        self.listing = replace(
            self.listing,
            complete=tuple(sorted([*others, landed], key=lambda c: (c.step, c.name))),
            architectures={**self.listing.architectures, landed.signature: architecture},
        )
        return landed

    def plan(self, *, live: bool = True, params: Params = PARAMS) -> Actions:
        return plan(self.listing, self.state, params, live=live)

    def act(self, actions: Actions, *, verdict: str = "declined") -> None:
        """Write the records that carrying out ``actions`` leaves behind."""
        for item in actions.quarantine:
            self.quarantine(item.checkpoint, item.architecture)
        for one in actions.passed:
            passed = PassRecord(
                name=one.name, step=one.step, stage=one.stage, signature=one.signature
            )
            self._put(passed={**self.state.passed, one.signature: passed})
        for checkpoint in actions.score:
            self.score(checkpoint)
        for key in actions.publish:
            self.publish(key)
        for skip in actions.skip:
            record = SkipRecord(window=skip.window, step=skip.step, reason=skip.reason)
            self._put(skips={**self.state.skips, skip.window: record})
        for fuse in actions.fuse:
            self.judge(fuse.key, fuse.window.step, verdict)
            if verdict == "publish":
                self.publish(fuse.key)

    def score(self, checkpoint: Checkpoint) -> None:
        content, segment, _ = checkpoint.files[0].version.split("|")
        known = self.state.checkpoints
        record = checkpoint_record(
            checkpoint.step,
            name=checkpoint.name,
            signature=checkpoint.signature,
            modified=checkpoint.modified,
            fingerprint=content,
            segment=segment,
            architecture=self.listing.architectures[checkpoint.signature],
            generation=generation_of(checkpoint, content, known.values()),
        )
        self._put(
            checkpoints={**known, checkpoint.signature: record},
            scored=self.state.scored | {checkpoint.signature},
        )

    def quarantine(self, checkpoint: Checkpoint, architecture: str | None = None) -> None:
        record = QuarantineRecord(
            name=checkpoint.name, uri=checkpoint.uri, step=checkpoint.step,
            signature=checkpoint.signature, architecture=architecture, reason="NaN",
        )  # fmt: skip
        self._put(quarantined={**self.state.quarantined, checkpoint.signature: record})

    def judge(self, key: str, step: int, verdict: str, test: int = 1) -> None:
        record = GateRecord.model_validate(
            {"window": key, "fusion": f"fusion of {key}", "step": step, "verdict": verdict,
             "reason": "", "test": test, "alpha": 0.01, "comparisons": []}
        )  # fmt: skip
        self._put(gates={**self.state.gates, key: record})

    def publish(self, key: str) -> None:
        record = PublicationRecord(
            fusion=f"fusion of {key}", window=key, step=self.state.gates[key].step, tag="t",
            commit="c", weights_hash="h", model_name="m", version="1",
        )  # fmt: skip
        self._put(publications={**self.state.publications, key: record})

    def _put(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]

    def run(self, *, live: bool = True, verdict: str = "declined") -> list[Actions]:
        """Plan and act until nothing is left to do."""
        done = []
        for _ in range(100):
            actions = self.plan(live=live)
            if not actions:
                return done
            self.act(actions, verdict=verdict)
            done.append(actions)
        pytest.fail("there is always something left to do")


def scored(*steps: int) -> World:
    world = World()
    for step in steps:
        world.score(world.land(step))
    return world


def steps_of(items: Iterable[Checkpoint | CheckpointRecord]) -> list[int]:
    return [item.step for item in items]


def fused(actions: Actions) -> list[list[int]]:
    return [steps_of(item.window.members) for item in actions.fuse]


# -- order of work -----------------------------------------------------------------------------


def test_an_empty_bucket_asks_for_nothing() -> None:
    assert not World().plan()


def test_nothing_is_fused_while_a_checkpoint_waits_to_be_scored() -> None:
    world = scored(100, 200, 300)
    world.land(400)
    actions = world.plan()
    assert steps_of(actions.score) == [400]
    assert not actions.fuse
    assert not actions.skip


def test_live_only_the_newest_window_is_fused_and_older_ones_are_superseded() -> None:
    actions = scored(100, 200, 300, 400).plan()
    assert fused(actions) == [[200, 300, 400]]
    assert [(s.step, s.reason) for s in actions.skip] == [
        (200, "superseded by step400"),
        (300, "superseded by step400"),
    ]


def test_live_nothing_older_is_fused_than_what_is_decided() -> None:
    world = scored(100, 200, 400)
    world.run()
    world.score(world.land(300, clock=1001.5))  # written before step 400, and read after it
    actions = world.plan()
    assert not actions.fuse
    assert [(s.step, s.reason) for s in actions.skip] == [(300, "superseded by step400")]
    assert fused(world.plan(live=False)) == [[100, 200, 300]]


def test_a_backfill_fuses_every_window_in_the_order_of_training() -> None:
    actions = scored(100, 200, 300, 400).plan(live=False)
    assert fused(actions) == [[100, 200], [100, 200, 300], [200, 300, 400]]
    assert not actions.skip


def test_a_window_that_is_closed_is_not_opened_again() -> None:
    world = scored(100, 200, 300)
    world.run()
    world.score(world.land(400))
    actions = world.plan()
    assert fused(actions) == [[200, 300, 400]]
    assert not actions.skip


def test_a_gate_that_said_publish_is_published_and_not_fused_again() -> None:
    world = scored(100, 200)
    (waiting,) = world.plan().fuse
    world.judge(waiting.key, 200, "publish")
    actions = world.plan()
    assert actions.publish == (waiting.key,)
    assert not actions.fuse
    world.publish(waiting.key)
    assert not world.plan()


def test_a_publication_that_is_delayed_stops_no_other_window() -> None:
    world = scored(100, 200)
    (earlier,) = world.plan().fuse
    world.judge(earlier.key, 200, "publish")
    world.state = replace(world.state, delayed=frozenset({earlier.key}))
    assert not world.plan(), "it is neither published nor fused again"
    world.score(world.land(300))
    actions = world.plan()
    assert not actions.publish
    assert fused(actions) == [[100, 200, 300]]


def test_what_waited_is_published_in_the_order_of_the_gates_tests() -> None:
    world = scored(100, 200)
    keys = []
    for number, step in enumerate((300, 400, 500, 600)):
        (item,) = world.plan().fuse
        keys.append(item.key)
        world.judge(item.key, item.window.step, "publish", test=number + 1)
        world.score(world.land(step))
    assert world.plan().publish == tuple(keys)


def test_what_retention_let_go_is_not_published_again_whatever_became_of_its_record() -> None:
    world = scored(100, 200)
    (item,) = world.plan().fuse
    world.judge(item.key, 200, "publish")
    world.state = replace(world.state, retired=frozenset({f"fusion of {item.key}"}))
    assert not world.plan()


def test_what_waited_until_parameters_or_text_changed_is_skipped() -> None:
    world = scored(100, 200)
    (earlier,) = world.plan().fuse
    world.judge(earlier.key, 200, "publish")
    world.state = replace(world.state, corpus="another")
    actions = world.plan()
    assert not actions.publish
    assert [(skip.window, skip.step) for skip in actions.skip] == [(earlier.key, 200)]
    assert "had changed" in actions.skip[0].reason
    assert fused(actions) == [[100, 200]]
    world.act(actions)
    assert not world.plan()


def test_a_fusion_left_unpublished_is_published_beside_the_newest_window() -> None:
    world = scored(100, 200)
    (earlier,) = world.plan().fuse
    world.judge(earlier.key, 200, "publish")
    world.score(world.land(300))
    actions = world.plan()
    assert actions.publish == (earlier.key,)
    assert fused(actions) == [[100, 200, 300]]
    assert not actions.skip


def test_another_corpus_or_science_opens_every_decision_again() -> None:
    world = scored(100, 200)
    world.run()
    assert not world.plan()
    assert fused(plan(world.listing, replace(world.state, corpus="other"), PARAMS)) == [[100, 200]]
    stricter = PARAMS.model_copy(
        update={"gate": PARAMS.gate.model_copy(update={"minimum_gain": 0.1})}
    )
    assert fused(plan(world.listing, world.state, stricter)) == [[100, 200]]


def test_a_checkpoint_deleted_by_the_trainer_leaves_the_windows_and_reopens_nothing() -> None:
    world = scored(100, 200, 300)
    world.run()
    world.listing = replace(world.listing, complete=world.listing.complete[1:])
    assert not world.plan()
    world.score(world.land(400))
    assert fused(world.plan()) == [[200, 300, 400]]


# -- what is left out --------------------------------------------------------------------------


def test_a_held_checkpoint_is_left_alone_and_the_rest_goes_on() -> None:
    world = scored(100, 200)
    waiting = world.land(300)
    world.state = replace(world.state, held=frozenset({waiting.signature}))
    actions = world.plan()
    assert not actions.score
    assert fused(actions) == [[100, 200]]


def test_a_quarantined_checkpoint_is_neither_scored_nor_fused() -> None:
    world = scored(100, 200, 300)
    world.quarantine(world.land(400))
    world.quarantine(world.listing.complete[1])
    actions = world.plan()
    assert not actions.score
    assert fused(actions) == [[100, 300]]


def test_a_quarantined_checkpoint_that_is_written_again_is_looked_at_afresh() -> None:
    world = scored(100, 200)
    world.quarantine(world.land(300))
    world.run()
    again = world.land(300, content="healthy", clock=5000)
    assert world.plan().score == (again,)


def test_damaged_checkpoints_are_quarantined_once_with_their_reason() -> None:
    world = scored(100, 200)
    file = Entry("model.safetensors", 1, "1", 1.0)
    broken = Checkpoint("step300", "/bucket/step300", 300, None, None, (file,))
    world.listing = replace(world.listing, damaged=(Refused(broken, "its header is damaged"),))
    actions = world.plan()
    assert [(q.checkpoint, q.reason) for q in actions.quarantine] == [
        (broken, "its header is damaged")
    ]
    world.act(actions)
    assert not world.plan().quarantine


def test_a_foreign_architecture_is_quarantined_against_the_majority() -> None:
    world = scored(100, 200)
    foreign = world.land(300, architecture="another")
    actions = world.plan()
    assert [q.checkpoint for q in actions.quarantine] == [foreign]
    assert "2 other checkpoints" in actions.quarantine[0].reason
    assert not actions.score
    world.act(actions)
    assert not world.plan().quarantine
    assert fused(world.plan()) == [[100, 200]]


def test_the_majority_is_the_trajectorys_and_not_that_of_what_is_left_of_it() -> None:
    world = scored(100, 200, 300, 400)
    foreign = [world.land(step, architecture="another") for step in (500, 600)]
    world.listing = replace(world.listing, complete=world.listing.complete[-3:])
    assert [q.checkpoint for q in world.plan().quarantine] == foreign


def test_a_declared_boundary_and_a_stage_have_majorities_of_their_own() -> None:
    world = scored(100, 200, 300)
    changed = [world.land(400, architecture="wider"), world.land(500, architecture="wider")]
    foreign = world.land(600)
    assert [q.checkpoint for q in world.plan().quarantine] == changed
    declared = PARAMS.model_copy(
        update={"window": PARAMS.window.model_copy(update={"boundaries": (400,)})}
    )
    assert [q.checkpoint for q in world.plan(params=declared).quarantine] == [foreign]
    in_stages = tuple(
        c if c.step < 400 else replace(c, stage="stage2") for c in world.listing.complete
    )
    world.listing = replace(world.listing, complete=in_stages)
    assert [q.checkpoint.step for q in world.plan().quarantine] == [600]


def test_without_a_majority_nobody_is_foreign() -> None:
    world = World()
    world.land(100, architecture="one")
    world.land(200, architecture="another")
    actions = world.plan()
    assert not actions.quarantine
    assert steps_of(actions.score) == [100, 200]


def test_an_architecture_that_nobody_has_read_is_not_judged() -> None:
    world = scored(100, 200)
    world.land(300, architecture="another")
    world.listing = replace(world.listing, architectures={})
    assert not world.plan().quarantine


def test_the_same_bytes_under_two_names_are_fused_once_and_not_superseded_by_themselves() -> None:
    world = scored(100, 200)
    world.score(world.land(200, name="step200-hf", content="200-one-usual"))
    actions = world.plan()
    assert fused(actions) == [[100, 200]]
    assert not actions.skip


# -- segments and generations ------------------------------------------------------------------


def test_a_window_waits_until_a_new_segment_has_enough() -> None:
    world = scored(100, 200)
    world.run()
    world.score(world.land(300, segment="longer context"))
    assert not world.plan()
    world.score(world.land(400, segment="longer context"))
    assert fused(world.plan()) == [[300, 400]]


def test_a_rollback_is_scored_and_its_windows_leave_the_abandoned_steps_out() -> None:
    world = scored(100, 200, 300, 400)
    world.run()
    world.land(300, content="300 again", clock=9000)
    (scoring, fusing) = world.run()
    assert steps_of(scoring.score) == [300]
    assert fused(fusing) == [[100, 200, 300]]
    (newest,) = fusing.fuse
    assert newest.window.newest.generation == 2


def test_a_rollback_is_known_by_its_first_checkpoint_though_that_is_gone() -> None:
    world = scored(100, 200, 300)
    for step in (250, 400, 500):
        world.land(step, content=f"{step} again", clock=9000.0 + step)
    world.run()
    world.score(world.land(600, clock=9900))
    left = tuple(c for c in world.listing.complete if c.step != 250)
    world.listing = replace(world.listing, complete=left)
    params = Params.model_validate({"window": {"size": 9, "minimum": 2}})
    (item,) = world.plan(params=params).fuse
    assert steps_of(item.window.members) == [100, 200, 400, 500, 600]


# -- properties --------------------------------------------------------------------------------

landings = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from(["one", "two"]),
        st.sampled_from(["usual", "usual", "usual", "foreign"]),
    ),
    max_size=8,
)


@given(landings=landings, live=st.booleans(), verdict=st.sampled_from(["publish", "declined"]))
@settings(max_examples=60, deadline=None)
def test_a_service_that_acts_comes_to_rest_and_closes_every_window_once(
    landings: Sequence[tuple[int, str, str]], live: bool, verdict: str
) -> None:
    world = World()
    closed: list[str] = []
    for clock, (step, segment, architecture) in enumerate(landings):
        world.land(
            step, segment=segment, architecture=architecture, content=f"c{clock}", clock=clock
        )
        for actions in world.run(live=live, verdict=verdict):
            closed += [item.key for item in actions.fuse] + [item.window for item in actions.skip]
    assert not world.plan(live=live)
    assert len(closed) == len(set(closed))


@given(landings=landings, live=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_listing_and_of_the_records_decides_nothing(
    landings: Sequence[tuple[int, str, str]], live: bool, seed: int
) -> None:
    world = World()
    for clock, (step, segment, architecture) in enumerate(landings):
        checkpoint = world.land(
            step, segment=segment, architecture=architecture, content=f"c{clock}", clock=clock
        )
        if clock % 4:
            world.score(checkpoint)
    shuffled = random.Random(seed)
    complete = list(world.listing.complete)
    records = list(world.state.checkpoints.items())
    shuffled.shuffle(complete)
    shuffled.shuffle(records)
    expected = world.plan(live=live)
    found = plan(
        replace(world.listing, complete=tuple(complete)),
        replace(world.state, checkpoints=dict(records)),
        PARAMS,
        live=live,
    )
    assert (found.skip, found.fuse) == (expected.skip, expected.fuse)
    assert set(found.score) == set(expected.score)
    assert {q.checkpoint for q in found.quarantine} == {q.checkpoint for q in expected.quarantine}


# -- what scoring may cost ---------------------------------------------------------------------


def limited(world: World, *, affordable: int | None = None, **scoring: object) -> Actions:
    params = Params.model_validate({"window": {"size": 3, "minimum": 2}, "scoring": scoring})
    return plan(world.listing, replace(world.state, affordable=affordable), params)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_kth_checkpoint_is_scored_whether_they_land_together_or_one_by_one(
    every: int,
) -> None:
    together, one_by_one = World(), World()
    scored = []
    for step in range(100, 900, 100):
        together.land(step)
        one_by_one.land(step)
        for checkpoint in limited(one_by_one, every=every).score:
            one_by_one.score(checkpoint)
            scored.append(checkpoint.step)
    assert scored == list(range(100, 900, 100 * every))
    assert [c.step for c in limited(together, every=every).score] == scored


def test_checkpoints_that_are_passed_over_stop_no_fusion_and_are_told() -> None:
    world = World()
    for step in range(100, 500, 100):
        world.land(step)
    world.act(limited(world, every=2))
    actions = limited(world, every=2)
    assert [member.step for member in actions.fuse[0].window.members] == [100, 300]
    assert actions.notes == ("2 checkpoints are passed over: scoring.every is 2",)


@pytest.mark.parametrize("kept", [1, 2, 3, 5])
@pytest.mark.parametrize("every", [2, 3])
def test_every_kth_is_scored_though_the_trainer_keeps_only_its_last_few(
    every: int, kept: int
) -> None:
    world = World()
    scored = []
    for step in range(100, 1300, 100):
        world.land(step)
        world.listing = replace(world.listing, complete=world.listing.complete[-kept:])
        actions = limited(world, every=every)
        world.act(actions)
        scored += steps_of(actions.score)
    assert scored == list(range(100, 1300, 100 * every))


def test_a_spent_budget_takes_the_newest_first_and_says_what_waits() -> None:
    world = World()
    for step in range(100, 500, 100):
        world.land(step)
    actions = limited(world, affordable=2, hours_per_day=1.5)
    assert [checkpoint.step for checkpoint in actions.score] == [300, 400]
    assert actions.notes == (
        "2 checkpoints wait: scoring.hours_per_day is 1.5, which allows 2 more now",
    )
    world.act(actions)
    spent = limited(world, affordable=0, hours_per_day=1.5)
    assert not spent.score
    assert [fuse.window.step for fuse in spent.fuse] == [400]
    assert [checkpoint.step for checkpoint in limited(world).score] == [100, 200]
