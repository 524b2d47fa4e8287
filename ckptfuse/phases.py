"""Phase notes: what the course of a run says of merging, as sentences for a person.

Pure functions over the rows of the overview, in the order of training. They decide nothing.

``no gain expected``   noise energy and measured gains of the last fusions are both falling to zero
``restart point``      the newest published merge before a spike that training has not left behind
"""

from collections.abc import Sequence

import numpy as np

from ckptfuse.notes import ENERGY
from ckptfuse.overview import AVAILABLE, Row

RECENT = 8
FEWEST = 6
CONCORDANT = 0.6  # Kendall's tau that a fall has at least, so that no single value makes one
REMAINING = 0.5  # of the first three's median that the last three's is at most


def phase_notes(rows: Sequence[Row]) -> list[str]:
    """What there is to say of the run's present phase."""
    return [said for said in (no_gain_expected(rows), restart_point(rows)) if said is not None]


def no_gain_expected(rows: Sequence[Row]) -> str | None:
    """Of the last eight fusions (six at least): both energy and gain fall, by half or more."""
    recent = [row for row in rows if row.plan is not None and ENERGY in row.plan.notes][-RECENT:]
    if len(recent) < FEWEST:
        return None
    energies = [row.plan.notes[ENERGY] for row in recent if row.plan is not None]
    gains = [row.gain or 0.0 for row in recent]  # nothing merged, nothing gained
    if not (_falls(energies) and _falls(gains)):
        return None
    return (
        f"no gain expected: over the last {len(recent)} fusions (steps {recent[0].step} to "
        f"{recent[-1].step}) the noise energy fell from {_early(energies):.4f} to "
        f"{_late(energies):.4f} nats and the measured gain from {_early(gains):+.4f} to "
        f"{_late(gains):+.4f}, as when the learning rate decays"
    )


def _falls(values: Sequence[float]) -> bool:
    older, newer = np.triu_indices(len(values), k=1)
    y = np.asarray(values, dtype=np.float64)
    tau = float(np.mean(np.sign(y[older] - y[newer])))
    return tau >= CONCORDANT and _early(values) > 0 and _late(values) <= REMAINING * _early(values)


def _early(values: Sequence[float]) -> float:
    return float(np.median(values[:3]))


def _late(values: Sequence[float]) -> float:
    return float(np.median(values[-3:]))


def restart_point(rows: Sequence[Row]) -> str | None:
    """The last healthy merge, as long as the loss has not come back since the last spike began."""
    scored = [row for row in rows if row.loss is not None]
    spikes = [index for index, row in enumerate(scored) if row.spike is not None]
    if not spikes:
        return None
    first = spikes[-1]
    while first > 0 and scored[first - 1].spike is not None:
        first -= 1
    usual = min((row.loss for row in scored[max(0, first - 3) : first] if row.loss), default=None)
    since = [row.loss for row in scored[first:] if row.loss is not None]
    if usual is None or min(since) <= usual:
        return None
    healthy = [r for r in scored[:first] if r.verdict in AVAILABLE]
    if not healthy or healthy[-1].fused is None:
        return None
    ahead = since[-1] - healthy[-1].fused
    return (
        f"the loss has not come back since step {scored[first].step} left the trend: should "
        f"training have to restart, the merge of step {healthy[-1].step} is the last healthy one, "
        f"{ahead:.4f} nats below the checkpoint of step {scored[-1].step}"
    )
