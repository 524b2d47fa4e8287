"""A plan's notes and remarks in words: for the log, ``status`` and the report page."""

from collections.abc import Mapping

from ckptfuse.records import PlanRecord

ENERGY, ENERGY_ERROR, SHARE = "noise_energy", "noise_energy_error", "noise_share"


def domain_energies(notes: Mapping[str, float]) -> dict[str, float]:
    """Domain -> noise energy in nats, where a rule noted them."""
    prefix = f"{ENERGY}."
    return {k.removeprefix(prefix): v for k, v in notes.items() if k.startswith(prefix)}


def explain(plan: PlanRecord) -> list[str]:
    """Sentences about the weights of a window; none where its rule had nothing to say."""
    said = []
    if ENERGY in plan.notes:
        said.append(_energy(plan.notes))
    if SHARE in plan.notes:
        said.append(
            f"noise share {plan.notes[SHARE]:.2f}: so much of the losses' differences is noise, "
            "the rest progress"
        )
    said.extend(_outcomes(plan))
    said.extend(plan.remarks)
    said.extend(
        f"step {m.step} is a spike, {m.spike:.4f} nats above the trend; its weight: {m.weight:.3f}"
        for m in plan.members
        if m.spike is not None
    )
    if plan.no_gain is not None:
        said.append(plan.no_gain)
    return said


def _energy(notes: Mapping[str, float]) -> str:
    by_domain = domain_energies(notes)
    parts = f" ({', '.join(f'{name} {value:.4f}' for name, value in by_domain.items())})"
    error = f" +- {notes[ENERGY_ERROR]:.4f}" if ENERGY_ERROR in notes else ""
    shown = parts if len(by_domain) > 1 else ""
    return f"noise energy {notes[ENERGY]:.4f}{error} nats{shown}"


def _outcomes(plan: PlanRecord) -> list[str]:
    """Of each merge that the rule had predicted: how it turned out."""
    return [
        f"predicted {merge.predicted:.4f}, measured {merge.loss:.4f} on selection text"
        + ("" if merge.standard_error is None else f" (standard error {merge.standard_error:.4f})")
        for merge in plan.merges
        if merge.predicted is not None
    ]
