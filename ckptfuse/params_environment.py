"""The environment's part of the parameters: CKPTFUSE_GATE__MINIMUM_GAIN is gate.minimum_gain.

An empty variable counts as one that is not set: that is what Compose, systemd and CI make of a
value that nobody gave.
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_origin

from pydantic import BaseModel

from ckptfuse.errors import ConfigurationError

PREFIX, DELIMITER = "CKPTFUSE_", "__"
#: What is read beside the parameters: by the commands, `deploy`, its template, Slurm's script.
_OTHERS = ("params", "home", "notify_url", "venv")
#: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_OF_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)$")
_ALIKE, _ALIKE_IN_SECTION = 0.85, 0.6

Location = tuple[int | str, ...]


def check_variables(model: type[BaseModel]) -> None:
    """Raises ConfigurationError for a misspelt variable, and for one that should be JSON."""
    for name, path in _variables():
        if path[0] in model.model_fields:
            _check_json(name, annotation_at(model, path))
        elif DELIMITER.join(path) not in _OTHERS:
            _refuse_or_warn(model, name, path)


def variables_of(location: Location) -> list[str]:
    """The variables that set the value there, or a part of it."""
    return [name for name, path in _variables() if location and _sets(name, path, location)]


def annotation_at(model: Any, location: Location) -> Any:
    """The type that is expected there; None where no key is so called."""
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = field.annotation if field else None
        else:
            model = model.__args__[1] if get_origin(model) is dict else None
    return model


def _variables() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and path of each that says something; case does not count."""
    for name, value in os.environ.items():
        if name.upper().startswith(PREFIX) and value:
            yield name, tuple(name[len(PREFIX) :].lower().split(DELIMITER))


def _sets(name: str, path: tuple[str, ...], location: Location) -> bool:
    if path[: len(location)] == location:
        return True
    if location[: len(path)] != path:
        return False
    try:  # a section as JSON: does it hold this key?
        value = json.loads(os.environ[name])
        for part in location[len(path) :]:
            value = value[part]
    except (ValueError, LookupError, TypeError):
        return False
    return True


def _check_json(name: str, annotation: Any) -> None:
    """pydantic's own message names the section alone."""
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    if not is_section and get_origin(annotation) not in (tuple, dict):
        return
    value = os.environ[name]
    try:
        json.loads(value)
    except ValueError as error:
        if get_origin(annotation) is tuple:
            like = f"such as '{json.dumps(value.replace(',', ' ').split())}'"
        else:
            like = f"or variables of its keys, {name}{DELIMITER}KEY"
        raise ConfigurationError(
            f"{name} in the environment: JSON is expected, {like} (found {value!r})"
        ) from error


def _refuse_or_warn(model: type[BaseModel], name: str, path: tuple[str, ...]) -> None:
    """Refuse what is surely meant for us, warn of the rest.

    Kubernetes sets CKPTFUSE_PORT and its like in every pod beside a Service called ckptfuse or
    ckptfuse-mlflow, and images and CI their CKPTFUSE_VERSION: a service that nobody attends must
    not stop for these. A variable that looks like a parameter must not be passed over either.
    """
    if _OF_KUBERNETES.search(name):
        _warn_once(name)
        return
    proper = {"_".join(known): known for known in [*_paths(model), *((o,) for o in _OTHERS)]}
    is_nested = len(path) > 1
    near = difflib.get_close_matches(
        "_".join(path), proper, n=1, cutoff=_ALIKE_IN_SECTION if is_nested else _ALIKE
    )
    if not (near or is_nested):
        _warn_once(name)
        return
    hint = f"did you mean {PREFIX}{DELIMITER.join(proper[near[0]]).upper()}? " if near else ""
    raise ConfigurationError(
        f"{name} in the environment: there is no such parameter ({hint}{PREFIX}KEY and "
        f"{PREFIX}SECTION{DELIMITER}KEY are read); correct it, or unset it"
    )


@cache
def _warn_once(name: str) -> None:
    logging.getLogger("ckptfuse").warning(
        "%s in the environment is no parameter of ckptfuse, and is passed over", name
    )


def _paths(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Those that one variable can set; of a section its keys, which nobody spells as one word."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ((name, *rest) for rest in _paths(field.annotation))
        else:
            yield (name,)
