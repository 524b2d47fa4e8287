"""What a bucket held when all of it was last listed: so that most looks list little of it.

A store tells of a thousand files a request, and a long run leaves a hundred thousand. Beyond
``MANY`` checkpoints the files of all are listed once an hour, and in between only those of new and
recent ones; of the others it is enough that their names are still there. It is no state: deleted,
the next look lists everything.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from ckptfuse.listing import Listing

MANY = 500
HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Remembered:
    """The signature of each checkpoint's folder; ``at``, when all of them were listed."""

    at: float
    signatures: dict[str, str]

    @property
    def is_usable(self) -> bool:
        # A time to come is of a clock that has been set right since.
        return len(self.signatures) > MANY and 0 <= time.time() - self.at < HOUR

    def save(self, file: Path) -> None:
        if len(self.signatures) > MANY:
            file.write_text(json.dumps({"at": self.at, "signatures": self.signatures}))


def load(file: Path) -> Remembered:
    """What was saved; nothing where nothing was, or it was cut off by a kill."""
    try:
        return Remembered(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return Remembered(0.0, {})


def remember(listing: Listing, at: float) -> Remembered:
    """The complete checkpoints of a listing; the others must be looked into again."""
    return Remembered(at, {one.name: one.signature for one in listing.complete})
