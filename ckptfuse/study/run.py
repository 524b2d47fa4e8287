"""A whole study: the trajectory scored, windows chosen, each of them measured."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckptfuse.checkpoints import check_bucket_uri, open_checkpoint
from ckptfuse.corpus import SPLITS
from ckptfuse.errors import CkptfuseError, ConfigurationError
from ckptfuse.layouts import read_layout
from ckptfuse.params import Params, WindowParams
from ckptfuse.records import CheckpointRecord
from ckptfuse.service import Service, losses_of, open_in
from ckptfuse.steps.look import discover, load_state, next_actions, quarantine
from ckptfuse.steps.score import score_checkpoints
from ckptfuse.store import open_store
from ckptfuse.study.cases import Point, Study, Views, views_of
from ckptfuse.study.choices import RuleChoice
from ckptfuse.study.compute import Scale
from ckptfuse.study.measure import study_window
from ckptfuse.window import Window, in_order, windows
from ckptfuse.workspace import Workspace

#: Told what is going on.
Say = Callable[[str], None]
DEFAULT_SIZES = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared: rules, in windows of these sizes that end at the same checkpoints.

    ``positions``: so many ends, evenly spread over those that the largest window allows, the last
    among them; or ``ends``, their steps. ``sizes`` None: the default ones that the trajectory is
    long enough for.
    """

    choices: tuple[RuleChoice, ...]
    sizes: tuple[int, ...] | None = None
    positions: int = 4
    ends: tuple[int, ...] | None = None
    tokens_per_step: float | None = None


def run_study(
    params: Params, plan: Plan, *, branch: str | None = None, say: Say = lambda text: None
) -> Study:
    """Study the trajectory in ``params.bucket``; ``branch`` is the bucket of its decay branch.

    What is measured lies in ``params.workspace``; killed and run again, it goes on from there.
    Raises ConfigurationError when no window can be made, CkptfuseError when the workspace is at
    work elsewhere, and what scoring raises.
    """
    service = open_in(Workspace(Path(params.workspace)), params)  # its scores are any name's
    with service.workspace.lock() as mine:
        if not mine:
            raise CkptfuseError(
                f"{service.workspace.root}: another process is at work there; try again later"
            )
        _check_folder(service)
        checkpoints = scored_checkpoints(service, say)
        if not checkpoints:
            raise ConfigurationError(
                f"{params.bucket}: no complete checkpoint there; folders such as checkpoint-1000 "
                "are expected (others: watch.pattern in params.yaml)"
            )
        views = views_of(params.corpus.domains)
        decay = _branch(service, branch, checkpoints, views, say) if branch else ()
        also = [c.step for c in checkpoints if decay and c.step < decay[0].step][-1:]
        chosen = choose_windows(checkpoints, plan, params.window, also=also)
        places = []
        for number, window in enumerate(chosen, start=1):
            say(f"window {number} of {len(chosen)}: {len(window.members)} to step {window.step}")
            places.append(study_window(service, window, plan.choices))
        return Study(
            name=params.trajectory,
            views=views,
            curve=_points(service, checkpoints, views),
            branch=decay,
            places=tuple(places),
            scale=_scale(service, checkpoints[-1], plan.tokens_per_step),
        )


def _check_folder(service: Service) -> None:
    """Refuse to mix two trajectories: one would be taken for a rollback of the other."""
    bucket = open_store(check_bucket_uri(service.params.bucket)).uri.rstrip("/")
    for record in service.records.all(CheckpointRecord).values():
        if not record.uri.startswith(f"{bucket}/"):
            raise ConfigurationError(
                f"{service.workspace.root} holds what was measured of {record.uri}; for {bucket} "
                "name another folder"
            )


def scored_checkpoints(service: Service, say: Say) -> list[CheckpointRecord]:
    """The healthy checkpoints of the bucket, scored now if need be, in the order of training."""
    (listing, state), held = discover(service), frozenset[str]()
    while True:
        actions = next_actions(service, listing, state, live=False)
        for item in actions.quarantine:
            quarantine(service, item)
            say(f"{item.checkpoint.name} is left out: {item.reason}")
        if actions.score:
            say(f"scoring {len(actions.score)} checkpoints")
            unscored = score_checkpoints(service, actions.score)
            held |= {item.checkpoint.signature for item in unscored if not item.quarantined}
            for missed in unscored:
                say(f"{missed.checkpoint.name} is left out: {missed.reason}")
        if not (actions.quarantine or actions.score):
            break
        state = load_state(service, held)
    present = [c.signature for c in listing.complete if c.signature not in state.quarantined]
    return in_order(state.checkpoints[s] for s in present if s in state.scored)


def choose_windows(
    checkpoints: Sequence[CheckpointRecord],
    plan: Plan,
    limits: WindowParams,
    *,
    also: Sequence[int] = (),
) -> list[Window]:
    """Full windows of every size, by where they end; those that end at the steps ``also`` too.

    ``limits`` are what else params.yaml says of windows. Raises ConfigurationError without any.
    """
    sizes = plan.sizes or [s for s in DEFAULT_SIZES if s <= len(checkpoints)]
    by_end: dict[tuple[str, int], list[Window]] = {}  # bytes may come back at another step
    for size in sizes:
        full = limits.model_copy(update={"size": size, "minimum": size})
        for window in windows(checkpoints, full):
            by_end.setdefault((window.newest.fingerprint, window.step), []).append(window)
    complete = [found for found in by_end.values() if len(found) == len(sizes)]
    complete.sort(key=lambda found: (found[0].newest.generation, found[0].step))
    steps = [found[0].step for found in complete]
    ends = _spread(steps, plan.positions) if plan.ends is None else plan.ends
    chosen = [w for found in complete if found[0].step in {*ends, *also} for w in found]
    if not chosen:
        wanted = f"windows of {', '.join(map(str, sizes))}" if sizes else "a window of 4"
        raise ConfigurationError(
            f"{len(checkpoints)} checkpoints are healthy: too few for {wanted} in one segment"
        )
    return chosen


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """So many of them, evenly, the last one first of all."""
    places = np.linspace(len(steps) - 1, 0, min(count, len(steps)))
    return [steps[round(place)] for place in places.tolist()]


def _points(
    service: Service, checkpoints: Sequence[CheckpointRecord], views: Views
) -> tuple[Point, ...]:
    points = []
    for checkpoint in checkpoints:
        losses = losses_of(service, checkpoint.fingerprint, checkpoint.tokenizer, "audit")
        seen = {name: losses.target(weights).mean for name, weights in views.items()}
        points.append(Point(checkpoint.step, seen))
    return tuple(points)


def _branch(
    service: Service, bucket: str, trunk: Sequence[CheckpointRecord], views: Views, say: Say
) -> tuple[Point, ...]:
    """The decay branch on the same text, without what it has in common with the trajectory."""
    workspace = str(Path(service.params.workspace) / "branch")
    params = service.params.model_copy(update={"bucket": bucket, "workspace": workspace})
    other = Service(params, Workspace(Path(workspace)))
    shared = {checkpoint.fingerprint for checkpoint in trunk}
    own = [c for c in scored_checkpoints(other, say) if c.fingerprint not in shared]
    if not own or own[0].step <= trunk[0].step:
        raise ConfigurationError(
            f"{bucket}: no decay branch of this trajectory; its checkpoints should follow step "
            f"{trunk[0].step} or a later one"
        )
    return _points(other, own, views)


def _scale(service: Service, newest: CheckpointRecord, tokens_per_step: float | None) -> Scale:
    layout = read_layout(open_checkpoint(newest.uri))
    target = [name for name, weight in service.scorer.target_weights.items() if weight]
    scored: dict[str, int] = {}
    for split in SPLITS:
        losses = losses_of(service, newest.fingerprint, newest.tokenizer, split)
        scored[split] = sum(losses.totals(name)[0] for name in target)
    if tokens_per_step is None and newest.tokens is not None and newest.step:
        tokens_per_step = newest.tokens / newest.step
    return Scale(
        parameters=sum(math.prod(tensor.shape) for tensor in layout.tensors.values()),
        tokens_per_step=tokens_per_step,
        scored=scored,
    )
