"""The arithmetic of a study: compute saved, regrets, means over windows, choice of windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfuse.curves import first_reached
from ckptfuse.errors import ConfigurationError, RecordError, RuleError
from ckptfuse.losses import Losses
from ckptfuse.params import Domain, WindowParams
from ckptfuse.study import IN, OUT, Case, Place, Plan, Study, parse_rules
from ckptfuse.study.cases import Point, fall_over, mean_losses, views_of
from ckptfuse.study.compute import Scale, recovered, saving, with_branch
from ckptfuse.study.run import choose_windows
from ckptfuse.study.tables import saved_of_branch, summarise
from tests.helpers import checkpoint_record, losses_on

falling = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12).map(
    lambda drops: [(10.0 * n, 5.0 - sum(drops[:n])) for n in range(len(drops))]
)


# -- compute saved -----------------------------------------------------------------------------


@given(curve=falling, share=st.floats(0, 0.999), place=st.integers(0, 10))
def test_a_loss_between_two_points_is_reached_in_proportion(
    curve: list[tuple[float, float]], share: float, place: int
) -> None:
    (x0, y0), (x1, y1) = curve[place % (len(curve) - 1) :][:2]
    level = y0 + share * (y1 - y0)
    reached = first_reached(curve, level)
    assert reached == pytest.approx(x0 + share * (x1 - x0), abs=1e-6)


@given(curve=falling, first=st.floats(-8, 6), second=st.floats(-8, 6), start=st.integers(0, 3))
def test_a_lower_loss_never_saves_less(
    curve: list[tuple[float, float]], first: float, second: float, start: int
) -> None:
    begin = curve[min(start, len(curve) - 1)][0]
    better, worse = (saving(curve, begin, loss) for loss in sorted((first, second)))
    assert better.steps >= worse.steps >= 0
    assert better.at_least >= worse.at_least
    assert better.at_least == (min(first, second) < curve[-1][1])


def test_what_the_run_has_already_saves_nothing_and_what_it_never_reaches_a_lower_bound() -> None:
    curve = [(0, 5.0), (10, 4.0), (20, 3.0), (30, 3.5)]
    assert saving(curve, 10, 4.5, cost=2.0).net == -2.0
    assert saving(curve, 10, 3.5).steps == 5
    assert (saving(curve, 10, 2.0).steps, saving(curve, 10, 2.0).at_least) == (20, True)
    assert saving(curve, 10, 3.5).net is None, "the tokens of a step are not known"


def test_the_cost_of_a_fusion_by_hand() -> None:
    scale = Scale(parameters=10, tokens_per_step=4, scored={"selection": 5, "audit": 10})
    # 4 members and the merge on 15 tokens, one probe on 5; two merges of 4 inputs: 88 x 2 x 10
    assert scale.fusion_flops(members=4, evaluations=1) == 1760
    assert scale.step_flops == 240
    assert Scale(10, None, {}).step_flops is None


@given(members=st.integers(1, 40), evaluations=st.integers(0, 40))
def test_every_merge_that_is_measured_costs(members: int, evaluations: int) -> None:
    scale = Scale(7, 4, {"selection": 5, "audit": 10})
    more = scale.fusion_flops(members=members, evaluations=evaluations + 1)
    assert more - scale.fusion_flops(members=members, evaluations=evaluations) == 14 * (5 + members)


def test_a_decay_branch_begins_at_the_checkpoint_it_was_taken_from() -> None:
    run = [(10.0, 5.0), (20.0, 4.5), (30.0, 4.2)]
    branch = with_branch(run, [(25.0, 4.1), (35.0, 3.5)])
    assert branch == [(20.0, 4.5), (25.0, 4.1), (35.0, 3.5)]
    assert recovered(branch, 4.0) == pytest.approx(0.5)
    assert recovered([(20.0, 4.0), (30.0, 4.0)], 3.9) is None


# -- windows and rules -------------------------------------------------------------------------


def model(loss: float, other: float = 0.0, seed: int = 0) -> Losses:
    """40 documents of ten tokens in each of two domains; noise of the documents' own."""
    hard = np.random.default_rng(1).normal(0, 2, (2, 40))
    hard = (hard - hard.mean(axis=1, keepdims=True)).ravel()
    own = np.random.default_rng(seed).normal(0, 0.1, 80)
    level = np.repeat([10 * loss, 10 * (other or loss)], 40)
    domain = np.repeat([0, 1], 40)
    return losses_on(level + hard + own, domain=domain, domains=("code", "prose"))


VIEWS = views_of({"code": Domain(path="a"), "prose": Domain(path="b", weight=0)})


def place(step: int, losses: dict[str, float], size: int = 3, **changes: object) -> Place:
    steps = tuple(range(step - 10 * (size - 1), step + 1, 10))
    values: dict[str, object] = {
        "steps": steps,
        "spikes": (),
        "fall": 0.0,
        "references": {name: model(2.0, seed=9) for name in ("newest", "best", "uniform")},
        "cases": tuple(
            Case(rule, (1 / size,) * size, 1, None, model(loss, seed=n))
            for n, (rule, loss) in enumerate(losses.items())
        ),
    }
    return Place(**{**values, **changes})  # type: ignore[arg-type]


def study_of(*places: Place, branch: tuple[Point, ...] = ()) -> Study:
    curve = tuple(Point(step, {IN: 3 - step / 100, OUT: 4.0}) for step in range(10, 110, 10))
    scale = Scale(10, 1.0, {"selection": 1})
    return Study("run", VIEWS, curve, branch, places, scale)


@given(st.lists(st.tuples(st.floats(1, 3), st.floats(1, 3), st.floats(1, 3)), min_size=1,
                max_size=5))  # fmt: skip
def test_somebody_wins_each_window_and_nobody_has_less_than_no_regret(
    found: list[tuple[float, float, float]],
) -> None:
    places = [place(30, dict(zip("abc", losses, strict=True))) for losses in found]
    summaries = summarise(study_of(*places), places)
    assert sum(summary.wins for summary in summaries) >= len(places)
    assert all(summary.worst_regret >= 0 for summary in summaries)
    for summary in summaries:
        assert (summary.wins == len(places)) == (summary.worst_regret <= 1e-9)


@given(st.lists(st.floats(1, 3), min_size=1, max_size=6))
def test_the_mean_gain_over_windows_is_the_mean_of_their_gains(losses: list[float]) -> None:
    places = [place(30, {"a": loss}) for loss in losses]
    (summary,) = summarise(study_of(*places), places)
    gains = [p.gain(p.cases[0], "newest", VIEWS[IN]) for p in places]
    found = summary.gains["newest"][IN]
    assert found.mean == pytest.approx(np.mean([gain.mean for gain in gains]))
    # The same documents every time: no more is known from ten windows than from one.
    assert found.standard_error == pytest.approx(gains[0].standard_error, rel=1e-6)


def test_losses_on_other_blocks_have_no_mean() -> None:
    with pytest.raises(RecordError, match="cannot be compared"):
        mean_losses([losses_on(np.ones(4)), losses_on(np.ones(4), blocks="others")])


def test_text_out_of_distribution_is_apart_and_decides_nothing() -> None:
    assert VIEWS == {IN: {"code": 1.0, "prose": 0.0}, OUT: {"code": 0.0, "prose": 1.0}}
    assert views_of({"code": Domain(path="a")}).keys() == {IN}
    places = [place(30, {"a": 1.0}, cases=(Case("a", (1.0, 0, 0), 0, None, model(1.0, 2.5)),))]
    (summary,) = summarise(study_of(*places), places)
    assert summary.gains["newest"][IN].mean == pytest.approx(1.0, abs=0.02)
    assert summary.gains["newest"][OUT].mean == pytest.approx(-0.5, abs=0.02)


def test_kinds_of_windows() -> None:
    assert place(30, {"a": 1.0}).kind == "steady"
    assert place(30, {"a": 1.0}, fall=0.06).kind == "drifting"
    assert place(30, {"a": 1.0}, fall=0.06, spikes=(20,)).kind == "damaged"


@given(st.floats(-0.01, 0.01), st.integers(2, 9))
def test_the_fall_of_a_line_is_its_own_whatever_one_checkpoint_does(slope: float, n: int) -> None:
    steps = [100 + 10 * i for i in range(n)]
    losses = [3 - slope * step for step in steps]
    assert fall_over(steps, losses) == pytest.approx(slope * 10 * (n - 1), abs=1e-9)
    if n >= 5:
        losses[2] += 1.0
        assert fall_over(steps, losses) == pytest.approx(slope * 10 * (n - 1), abs=0.04 * n)


def test_a_merge_is_held_against_the_decay_only_where_the_decay_begins() -> None:
    branch = (Point(60, {IN: 2.2, OUT: 4.0}), Point(70, {IN: 2.0, OUT: 4.0}))
    begins, later = place(50, {"a": 2.1}), place(90, {"a": 1.9})
    study = study_of(begins, later, branch=branch)
    saved = saved_of_branch(study, begins, begins.cases[0])
    assert saved is not None
    assert saved.steps == pytest.approx(15, abs=2)
    assert saved_of_branch(study, later, later.cases[0]) is None
    (summary,) = summarise(study, study.places)
    assert summary.against_branch is not None
    assert summary.against_branch.windows == 1
    assert summary.of_decay == pytest.approx(0.8, abs=0.05)  # of 2.5 - 2.0


# -- what is compared --------------------------------------------------------------------------


def chosen(plan: Plan, count: int = 10, also: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    records = [checkpoint_record(10 * n) for n in range(1, count + 1)]
    found = choose_windows(records, plan, WindowParams(), also=also)
    return [(len(window.members), window.step) for window in found]


def test_windows_of_every_length_end_at_the_same_steps() -> None:
    assert chosen(Plan((), (2, 5), positions=3)) == [
        (2, 50), (5, 50), (2, 70), (5, 70), (2, 100), (5, 100)
    ]  # fmt: skip
    assert chosen(Plan((), (2,), positions=1)) == [(2, 100)]
    assert chosen(Plan((), (9,), positions=50)) == [(9, 90), (9, 100)]
    assert chosen(Plan((), (3,), ends=(40, 70)), also=(60,)) == [(3, 40), (3, 60), (3, 70)]


def test_default_lengths_are_those_that_fit() -> None:
    assert chosen(Plan((), positions=1)) == [(4, 100), (8, 100)]


@pytest.mark.parametrize("plan", [Plan((), (11,)), Plan((), (4,), ends=(45,))])
def test_a_trajectory_that_is_too_short_is_told(plan: Plan) -> None:
    with pytest.raises(ConfigurationError, match="10 checkpoints are healthy: too few"):
        chosen(plan)


def test_rules_are_written_with_their_options() -> None:
    found = parse_rules("uniform, ema(alpha=0.5),bayes(evaluations=3, space=pairwise),uniform")
    labels = [choice.label for choice in found]
    assert labels == ["uniform", "ema(alpha=0.5)", "bayes(evaluations=3, space=pairwise)"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("unifrom", "'unifrom' is unknown"),
        ("ema(alpha)", "'alpha' is not KEY=VALUE"),
        ("ema(alpha=2)", "option alpha is 2"),
        ("ema(beta=1)", "no option 'beta'"),
        ("uniform,,best", r"NAME or NAME\(KEY=VALUE, ...\) is expected"),
        ("ema(alpha=0.5", "is expected"),
    ],
)
def test_rules_that_cannot_be_are_told(written: str, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        parse_rules(written)
