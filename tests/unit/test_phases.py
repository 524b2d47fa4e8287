"""What the course of a run says of merging: fading gains, and where to restart."""

from collections.abc import Sequence

from ckptfuse.overview import Row
from ckptfuse.phases import no_gain_expected, phase_notes, restart_point
from tests.helpers import member, plan_record


def fusions(energies: Sequence[float], gains: Sequence[float | None]) -> list[Row]:
    """One fusion every 100 steps with this noise energy and this gain."""
    rows = []
    for n, (energy, gain) in enumerate(zip(energies, gains, strict=True), start=1):
        plan = plan_record(100 * n, [member(100 * n, 2.0)], notes={"noise_energy": energy})
        rows.append(Row(f"step{100 * n}", 100 * n, 2.0, gain=gain, plan=plan))
    return rows


FADING = [0.10, 0.095, 0.08, 0.06, 0.045, 0.03, 0.012, 0.002]


def test_energy_and_gains_that_fall_to_zero_promise_nothing_more() -> None:
    said = no_gain_expected(fusions(FADING, [0.05, 0.05, 0.04, 0.03, 0.02, 0.01, None, None]))
    assert said is not None
    assert said.startswith("no gain expected: over the last 8 fusions (steps 100 to 800)")
    assert "from 0.0950 to 0.0120 nats" in said
    assert "from +0.0500 to +0.0000" in said


def test_gains_that_hold_are_still_expected() -> None:
    assert no_gain_expected(fusions(FADING, [0.05] * 8)) is None
    assert no_gain_expected(fusions([0.1] * 8, FADING)) is None


def test_one_low_value_or_a_short_history_is_no_trend() -> None:
    low = [0.1, 0.11, 0.1, 0.12, 0.1, 0.11, 0.1, 0.001]
    assert no_gain_expected(fusions(low, low)) is None
    assert no_gain_expected(fusions(FADING[-5:], FADING[-5:])) is None


def test_noise_in_a_clear_fall_does_not_hide_it() -> None:
    noisy = [0.10, 0.105, 0.08, 0.085, 0.045, 0.05, 0.012, 0.002]
    assert no_gain_expected(fusions(noisy, noisy)) is not None


def run(*losses: float, spikes: Sequence[int] = ()) -> list[Row]:
    """Checkpoints every 100 steps; the second has the last merge that was published, at 2.5."""
    return [
        Row(f"step{100 * n}", 100 * n, loss, spike=0.5 if n in spikes else None,
            verdict="published" if n == 2 else "declined", fused=2.5)
        for n, loss in enumerate(losses, start=1)
    ]  # fmt: skip


def test_a_collapse_suggests_the_last_healthy_merge() -> None:
    rows = run(3.0, 2.9, 2.9, 3.5, 3.6, 3.5, spikes=[4, 5])
    assert restart_point(rows) == (
        "the loss has not come back since step 400 left the trend: should training have to "
        "restart, the merge of step 200 is the last healthy one, 1.0000 nats below the checkpoint "
        "of step 600"
    )
    assert phase_notes(rows) == [restart_point(rows)]


def test_a_spike_that_training_has_left_behind_suggests_nothing() -> None:
    assert restart_point(run(3.0, 2.9, 2.9, 3.5, 2.85, spikes=[4])) is None
    assert restart_point(run(3.0, 2.9, 2.9, 2.8)) is None


def test_without_a_merge_before_the_spike_there_is_nothing_to_suggest() -> None:
    rows = run(3.0, 3.5, spikes=[2])
    assert restart_point(rows) is None
    assert restart_point([]) is None
