"""Windows: ancestors only, of one segment, and what opens a new generation."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfuse.checkpoints import Checkpoint
from ckptfuse.errors import ConfigurationError
from ckptfuse.params import WindowParams
from ckptfuse.records import CheckpointRecord
from ckptfuse.store import Entry
from ckptfuse.window import generation_of, in_order, lineages, segment_of, window_key, windows
from tests.helpers import checkpoint_record

SMALL = WindowParams(size=3, minimum=2)


def steps(records: Sequence[CheckpointRecord], params: WindowParams = SMALL) -> list[list[int]]:
    return [[member.step for member in found.members] for found in windows(records, params)]


def again(step: int, generation: int) -> CheckpointRecord:
    return checkpoint_record(step, generation=generation, fingerprint=f"f{step}-{generation}")


def listed(step: int, modified: float) -> Checkpoint:
    file = Entry("model.safetensors", 100, "1", modified)
    return Checkpoint(f"step{step}", f"/bucket/step{step}", step, None, None, (file,))


def test_each_checkpoint_ends_a_window_of_at_most_size_once_there_are_enough() -> None:
    records = [checkpoint_record(step) for step in (100, 200, 300, 400)]
    assert steps(records) == [[100, 200], [100, 200, 300], [200, 300, 400]]


def test_too_few_checkpoints_are_no_window() -> None:
    assert steps([checkpoint_record(100)]) == []


def test_a_window_never_spans_two_segments() -> None:
    records = [checkpoint_record(step, segment="warm" if step < 300 else "main")
               for step in (100, 200, 300, 400)]  # fmt: skip
    assert steps(records) == [[100, 200], [300, 400]]


def test_a_boundary_begins_a_segment_at_its_step() -> None:
    records = [checkpoint_record(step) for step in (100, 200, 300, 400)]
    params = WindowParams(size=3, minimum=2, boundaries=(300,))
    assert steps(records, params) == [[100, 200], [300, 400]]


def test_boundaries_may_be_declared_in_any_order() -> None:
    records = [checkpoint_record(step) for step in range(100, 700, 100)]
    params = WindowParams(size=6, minimum=2, boundaries=(500, 300))
    assert steps(records, params) == [[100, 200], [300, 400], [500, 600]]


def test_after_a_rollback_later_steps_of_the_old_generation_are_no_ancestors() -> None:
    records = [*map(checkpoint_record, (100, 200, 300, 400)), again(300, 2), again(400, 2)]
    found = windows(records, SMALL)
    last = [(member.step, member.generation) for member in found[-1].members]
    assert last == [(200, 1), (300, 2), (400, 2)]
    first = [(member.step, member.generation) for member in found[-2].members]
    assert first == [(100, 1), (200, 1), (300, 2)]


def test_a_rollback_behind_a_rollback_leaves_only_what_both_kept() -> None:
    records = [*map(checkpoint_record, (100, 200, 300, 400)), again(400, 2), again(200, 3)]
    last = windows(records, SMALL)[-1].members
    assert [(member.step, member.generation) for member in last] == [(100, 1), (200, 3)]


def test_the_same_bytes_under_two_names_are_one_member() -> None:
    records = [*map(checkpoint_record, (100, 200)), checkpoint_record(200, name="copy")]
    assert steps(records) == [[100, 200]]


def test_a_window_reaches_back_over_so_many_steps() -> None:
    records = [checkpoint_record(step) for step in range(100, 600, 100)]
    params = WindowParams(size=8, minimum=2, span_steps=250)
    assert steps(records, params)[-1] == [300, 400, 500]
    assert steps(records, WindowParams(size=2, minimum=2, span_steps=250))[-1] == [400, 500]


def test_a_window_reaches_back_over_so_many_tokens_by_name_or_by_step() -> None:
    named = [checkpoint_record(s, tokens=s * 10**7) for s in range(100, 600, 100)]
    bare = [checkpoint_record(step) for step in range(100, 600, 100)]
    params = WindowParams(size=8, minimum=2, span_tokens=2e9)
    assert steps(named, params)[-1] == [300, 400, 500]
    counted = params.model_copy(update={"tokens_per_step": 2e7})
    assert steps(bare, counted)[-1] == [400, 500]
    assert steps(named, counted)[-1] == [300, 400, 500], "what a name says stands"


def test_a_span_of_tokens_that_nobody_knows_is_told() -> None:
    records = [checkpoint_record(step) for step in (100, 200)]
    with pytest.raises(ConfigurationError, match=r"'step200' does not say .*tokens_per_step"):
        windows(records, WindowParams(size=8, minimum=2, span_tokens=2e9))


def test_members_keep_their_spacing_counted_from_the_newest() -> None:
    records = [checkpoint_record(step) for step in (100, 150, 190, 200, 290, 300)]
    params = WindowParams(size=3, minimum=2, spacing=100)
    found = {window[-1]: window for window in steps(records, params)}
    assert found[300] == [100, 200, 300]
    assert found[290] == [190, 290]
    assert 190 not in found, "no checkpoint before it is a hundred steps away"


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.sampled_from("ab")), unique=True),
    st.randoms(),
)
@settings(max_examples=100, deadline=None)
def test_windows_keep_their_promises_in_whatever_order_records_come(
    drawn: list[tuple[int, int, str]], random: object
) -> None:
    records = [
        checkpoint_record(step, generation=generation, segment=segment,
                          fingerprint=f"{step}-{generation}-{segment}")
        for step, generation, segment in drawn
    ]  # fmt: skip
    unique = list({(r.step, r.generation): r for r in records}.values())
    params = WindowParams(size=3, minimum=2, boundaries=(5,), span_steps=6, spacing=2)
    found = windows(unique, params)
    for window in found:
        members = window.members
        assert 2 <= len(members) <= 3
        assert len({(m.segment, m.step >= 5) for m in members}) == 1
        assert [m.step for m in members] == sorted({m.step for m in members})
        assert [m.generation for m in members] == sorted(m.generation for m in members)
        assert members[-1] == window.newest
        assert members[-1].step - members[0].step <= 6
        gaps = [b.step - a.step for a, b in pairwise(members)]
        assert min(gaps) >= 2
    random.shuffle(unique)  # type: ignore[attr-defined]
    assert windows(unique, params) == found


# -- generations -------------------------------------------------------------------------------


def test_a_later_step_goes_on_in_its_generation() -> None:
    known = [checkpoint_record(100), checkpoint_record(200, generation=2)]
    assert generation_of(listed(300, modified=1000), "new", known) == 2
    assert generation_of(listed(300, modified=1000), "new", []) == 1


def test_a_lower_step_written_later_is_a_rollback() -> None:
    known = [checkpoint_record(100), checkpoint_record(300)]
    assert generation_of(listed(200, modified=1000), "new", known) == 2


def test_a_step_written_again_with_other_bytes_is_a_rollback() -> None:
    known = [checkpoint_record(100), checkpoint_record(200)]
    assert generation_of(listed(200, modified=1000), "new", known) == 2


def test_a_step_that_was_only_late_to_be_read_is_no_rollback() -> None:
    known = [checkpoint_record(100), checkpoint_record(300)]
    assert generation_of(listed(200, modified=250), "new", known) == 1


def test_the_same_bytes_touched_later_change_nothing() -> None:
    known = [checkpoint_record(100), checkpoint_record(200), checkpoint_record(300)]
    assert generation_of(listed(200, modified=1000), "f200", known) == 1


def test_the_steps_of_an_older_generation_do_not_count_against_a_newer_one() -> None:
    known = [checkpoint_record(100), checkpoint_record(400), again(200, 2)]
    assert generation_of(listed(300, modified=1000), "new", known) == 2


def test_a_stage_is_a_generation_of_its_own_and_leaves_those_before_it_theirs() -> None:
    first = [checkpoint_record(step, stage="stage1") for step in (100, 200, 400)]
    second = replace(listed(100, modified=1000), stage="stage2")
    assert generation_of(second, "new", first) == 2
    known = [*first, checkpoint_record(100, stage="stage2", generation=2, fingerprint="f")]
    assert generation_of(replace(listed(200, modified=1100), stage="stage2"), "new", known) == 2
    late = replace(listed(300, modified=300), stage="stage1")
    assert generation_of(late, "new", known) == 1, "it was only late to be read"


# -- identities --------------------------------------------------------------------------------


def test_a_window_is_named_by_its_newest_checkpoint_under_one_science_and_corpus() -> None:
    newest = checkpoint_record(300)
    key = window_key(newest, "science", "corpus")
    assert key == window_key(checkpoint_record(300, uri="/moved", name="x"), "science", "corpus")
    others = [
        window_key(checkpoint_record(300, fingerprint="other"), "science", "corpus"),
        window_key(checkpoint_record(301, fingerprint="f300"), "science", "corpus"),
        window_key(newest, "another", "corpus"),
        window_key(newest, "science", "another"),
    ]
    assert len({key, *others}) == 5


def test_every_part_of_the_training_setup_makes_a_segment() -> None:
    setup = {"stage": "s", "config": {"x": 1}, "tokenizer": "t", "architecture": "a"}
    changes = [{}, {"stage": None}, {"config": {"x": 2}}, {"tokenizer": "u"}, {"architecture": "b"}]
    assert len({segment_of(**{**setup, **change}) for change in changes}) == 5  # type: ignore[arg-type]


def test_of_two_checkpoints_of_one_step_the_one_written_last_counts() -> None:
    first = checkpoint_record(200, name="step200", modified=5.0)
    again = checkpoint_record(200, name="step200-hf", modified=6.0, fingerprint="other")
    elsewhere = checkpoint_record(200, name="stage2-step200", segment="two", fingerprint="third")
    for records in ([first, again, elsewhere], [elsewhere, again, first]):
        assert in_order([*records, checkpoint_record(100)]) == [
            checkpoint_record(100), elsewhere, again
        ]  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from("ab")), unique=True)
)
@settings(max_examples=200, deadline=None)
def test_a_lineage_is_all_that_training_passed_through(drawn: list[tuple[int, int, str]]) -> None:
    records = in_order(
        checkpoint_record(step, generation=generation, segment=segment,
                          fingerprint=f"{step}-{generation}-{segment}")
        for step, generation, segment in drawn
    )  # fmt: skip
    starts = {g: min(r.step for r in records if r.generation == g)
              for g in {r.generation for r in records}}  # fmt: skip

    def is_ancestor(record: CheckpointRecord, newest: CheckpointRecord) -> bool:
        later = [s for g, s in starts.items() if record.generation < g <= newest.generation]
        return (
            (record.segment, record.step >= 5) == (newest.segment, newest.step >= 5)
            and record.generation <= newest.generation
            and record.step < min([newest.step + 1, *later])
        )

    found = [list(line) for line in lineages(records, (5,))]
    assert found == [[r for r in records if is_ancestor(r, newest)] for newest in records]
