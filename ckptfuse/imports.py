"""Functions of the team's own, named in params.yaml as ``package.module:function``."""

import importlib
from collections.abc import Callable
from typing import Any

from ckptfuse.errors import ConfigurationError


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function of this name, from what Python can import; ``key`` says who asks for it."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ConfigurationError(f"{key} {name!r}: package.module:function is expected")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"{key} {name!r}: {error}; is its folder on PYTHONPATH?"
        ) from error
    if not callable(found):
        raise ConfigurationError(f"{key} {name!r} is no function")
    return found  # type: ignore[no-any-return]
