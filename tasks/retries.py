"""Which failures another attempt can mend."""

from typing import Any

from ckptfuse.errors import MissingFile, StoreError


def transient(task: Any, run: Any, state: Any) -> bool:
    """Retry what a store says in passing; not what a person must correct."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StoreError) and not isinstance(error, MissingFile)
