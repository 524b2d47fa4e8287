"""A callback for the Hugging Face Trainer: each save tells the service to look."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ckptfuse.errors import CkptfuseError
from tasks.notify import checkpoint_written

log = logging.getLogger("ckptfuse")


class NotifyCallback(TrainerCallback):
    """``Trainer(callbacks=[NotifyCallback("my-run")])``; a server that is down stops nothing."""

    def __init__(self, trajectory: str) -> None:
        self._trajectory = trajectory

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One event for each checkpoint, from the main process alone."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        try:
            checkpoint_written(self._trajectory, uri=str(folder))
        except CkptfuseError as error:
            log.warning("%s; the service's schedule looks instead", error)
