"""The stages of dvc.yaml, each a hidden command."""

import typer

stage = typer.Typer(hidden=True, no_args_is_help=True, help="The stages of dvc.yaml.")


@stage.command("score")
def stage_score(key: str) -> None:
    """Score the checkpoint that window.yaml calls KEY."""
    from tasks.stages import score

    score(key)


@stage.command("decide")
def stage_decide() -> None:
    """Derive the weights again and pass the pinned ones on."""
    from tasks.stages import decide

    decide()


@stage.command("fuse")
def stage_fuse() -> None:
    """Merge with the pinned weights."""
    from tasks.stages import fuse

    fuse()


@stage.command("evaluate")
def stage_evaluate() -> None:
    """Judge the merge and write its figures."""
    from tasks.stages import evaluate_stage

    evaluate_stage()
