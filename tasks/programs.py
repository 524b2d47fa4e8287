"""Git and DVC as the service runs them: nobody is there to answer what they ask.

What a person has set for Git in the environment holds here too: GIT_SSH_COMMAND, GIT_CONFIG_GLOBAL.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ckptfuse.errors import PublicationError
from ckptfuse.passwords import without_passwords
from ckptfuse.processes import end_with_parent

_LATE = (
    "not done after {patience:.0f} s, and so it was ended; does its remote answer, and to this "
    "user without a question (a password, an unknown host)?"
)


def run(
    command: Sequence[str],
    folder: Path,
    *,
    called: str,
    patience: float,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What the command prints; raises PublicationError when it fails or is not done in time.

    ``called``: the command in messages. ``patience``: seconds. ``environment`` is added to ours.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**_environment(), **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # without a terminal, on which ssh would ask
        preexec_fn=end_with_parent,
    )
    try:
        with process, _ended_on_error(process):
            printed, complained = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        printed, complained = "", _LATE.format(patience=patience)
    else:
        if process.returncode == 0:
            return printed.strip()
    said = f"{called}\n  in {folder}: {(complained or printed).strip()}"
    raise PublicationError(without_passwords(said))


@contextmanager
def _ended_on_error(process: subprocess.Popen[str]) -> Iterator[None]:
    """With what it has started and waits for, such as ssh."""
    try:
        yield
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def _environment() -> dict[str, str]:
    """Ours, with no way left to ask somebody."""
    kept = {k: v for k, v in os.environ.items() if k not in _of_one_repository()}
    never = {"GIT_TERMINAL_PROMPT": "0", "SSH_ASKPASS_REQUIRE": "never"}
    return {**kept, **never, "DVC_NO_ANALYTICS": "1"}


@cache
def _of_one_repository() -> frozenset[str]:
    """What ties Git to a repository that is not ours, when we run under its hook: GIT_DIR, say."""
    command = ["git", "rev-parse", "--local-env-vars"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # With this one people give settings, such as a credential helper, to Git in containers.
    return frozenset(told.split()) - {"GIT_CONFIG_COUNT"}
