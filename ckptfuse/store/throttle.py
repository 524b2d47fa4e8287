"""Caps on reading, so that the trainer's storage has room for the trainer.

``configure`` sets them once for the process; ``open_store`` then gives every store that it opens
the process's one `Throttle`, so that all threads, merges, loads, hashes and listings together
keep to it, on S3 and on network file systems alike. Only what lies in the service's own folders
is read without: its records are many small files that the trainer's storage never sees. Naming
what is free rather than what is capped errs on the trainer's side: a checkpoint or corpus that
lies somewhere unforeseen is capped too. A store that is made directly (``FolderStore(path)``) is
free: that is how the service reaches its own files.

The scoring job is another process: it is told the same caps in its request and, as its parent
waits for it, the two do not add up.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that may be read in a second; None: as fast as it goes."""

    megabytes_per_second: float | None = None  # of 10^6 bytes
    requests_per_second: float | None = None

    @property
    def seconds_a_byte(self) -> float:
        return 0.0 if self.megabytes_per_second is None else 1e-6 / self.megabytes_per_second

    @property
    def seconds_a_request(self) -> float:
        return 0.0 if self.requests_per_second is None else 1 / self.requests_per_second


class Throttle:
    """A bucket of tokens that holds one request: each pays with time, before the next may start.

    A request starts when those before it are paid for, at the caps' rates of bytes and requests,
    whichever takes longer. So in any stretch of time, what was started is at most the rate times
    the stretch, and one request more. What boto3 tries again by itself is not counted again.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._bytes_free = self._requests_free = float("-inf")

    def wait(self, size: int, requests: int = 1) -> None:
        """Before a request for ``size`` bytes: return when it may start."""
        if self.limits == _NONE:
            return
        with self._lock:
            start = self._pay(size, requests)
        pause = start - self._clock()
        if pause > 0:
            self._sleep(pause)

    def spent(self, size: int) -> None:
        """After a read whose size was not known before: the next one waits for it."""
        if self.limits != _NONE:
            with self._lock:
                self._pay(size, 0)

    def _pay(self, size: int, requests: int) -> float:
        start = max(self._clock(), self._bytes_free, self._requests_free)
        self._bytes_free = max(start, self._bytes_free) + size * self.limits.seconds_a_byte
        self._requests_free = start + requests * self.limits.seconds_a_request
        return start


_NONE = Limits()
#: Of stores that were not opened by ``open_store``, and where nothing is configured.
FREE = Throttle(_NONE)


@dataclass(frozen=True, slots=True)
class _Configured:
    throttle: Throttle
    own: tuple[Path, ...]


_configured = _Configured(FREE, ())


def configure(limits: Limits, own: Iterable[Path] = ()) -> None:
    """Cap what this process reads from now on, but for the folders ``own``.

    The same limits again go on counting where they were. Stores that are open keep theirs.
    """
    global _configured
    kept = _configured.throttle
    throttle = kept if kept.limits == limits else Throttle(limits)
    _configured = _Configured(throttle, tuple(folder.resolve() for folder in own))


def limits() -> Limits:
    """What this process is held to."""
    return _configured.throttle.limits


def own() -> tuple[Path, ...]:
    """The folders that are read without a cap."""
    return _configured.own


def of(uri: str) -> Throttle:
    """The throttle of a store at this local path or ``s3://`` URI."""
    now = _configured
    if now.throttle is FREE or "://" in uri:
        return now.throttle
    path = Path(uri).resolve()
    return FREE if any(path.is_relative_to(folder) for folder in now.own) else now.throttle
