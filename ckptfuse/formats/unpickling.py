"""Reading the pickles that torch writes without running any code that they name.

A pickle is a program: unpickled in full it may call anything. Here each global that it names must
be on a list of the reader's own, which gives a plain stand-in for it, never the real thing; so
nothing of torch is imported, let alone called, and a name that is not on the list is refused.

The pure-Python unpickler is used on purpose: the one in C believes a damaged memo index and
allocates as much as it says. It takes 2.2 times as long (100,000 chunks in 8 s instead of 3.5).
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from ckptfuse.errors import DamagedCheckpoint

MAX_PICKLE_SIZE = 1_000_000_000

#: (module, name) -> what stands in for it.
Admitted = Mapping[tuple[str, str], Any]


def unpickle(
    data: bytes,
    admitted: Admitted,
    where: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The object in ``data``, made of plain values and the stand-ins of ``admitted``.

    Raises DamagedCheckpoint naming ``where`` when it is no pickle or names anything else.
    """
    try:
        return _Unpickler(io.BytesIO(data), admitted, where, persistent).load()
    except DamagedCheckpoint:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedCheckpoint(f"{where}: a damaged pickle: {error!r}") from error


class _Unpickler(pickle._Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        admitted: Admitted,
        where: str,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._admitted = admitted
        self._where = where
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise DamagedCheckpoint(
                f"{self._where}: names {module}.{name}, which a checkpoint has no need of; it is "
                "not unpickled. If your trainer writes it, save the weights as safetensors"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise DamagedCheckpoint(f"{self._where}: a persistent id where none is expected")
        return self._persistent(pid)
