"""One finding of the doctor's: how things are, in one sentence, and how to mend them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ckptfuse.errors import CkptfuseError
from ckptfuse.passwords import without_passwords

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Check:
    """``warning``: the service works, but not as it should; ``failed``: it will not."""

    name: str
    state: State
    said: str
    mend: str | None = None


def ok(name: str, said: str) -> Check:
    return Check(name, "ok", without_passwords(said))


def warning(name: str, said: str, mend: str) -> Check:
    return Check(name, "warning", without_passwords(said), mend)


def failed(name: str, said: str, mend: str) -> Check:
    return Check(name, "failed", without_passwords(said), mend)


def carried_out(name: str, check: Callable[[], Check], mend: str) -> Check:
    """The check's own finding, or that it met an error that was to be expected."""
    try:
        return check()
    except (CkptfuseError, OSError) as error:
        return failed(name, str(error), mend)
