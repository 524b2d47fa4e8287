"""How far a merge is, and what its time went into."""

from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Tally:
    """How far a pass is: bytes, its seconds, and those of all its threads by their work."""

    read: int = 0
    written: int = 0
    reading: float = 0.0
    adding: float = 0.0
    writing: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Tally)))


#: Called with what was done and the bytes that are to be written in all.
Progress = Callable[[Tally, int], None]


def ignore(tally: Tally, size: int) -> None:
    """No progress is wanted."""
