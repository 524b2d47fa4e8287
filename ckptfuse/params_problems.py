"""What pydantic finds wrong with parameters, in words that name the key and its place."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ckptfuse.params_environment import Location, annotation_at, variables_of
from ckptfuse.passwords import without_passwords

_A_SECTION = "a section of `key: value` was expected"
_PLAIN = {
    "tuple_type": "a list was expected, such as [first, second]",
    "model_type": _A_SECTION,
    "model_attributes_type": _A_SECTION,
    "dict_type": _A_SECTION,
}


def explain(where: str, error: ValidationError, model: type[BaseModel]) -> str:
    """One line; ``where``: the file, of which the values are that the environment did not set."""
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        variables = variables_of(problem["loc"])
        place = f"{', '.join(variables)} in the environment" if variables else where
        found.setdefault(place, []).append(_said(problem, model))
    return "; ".join(f"{place}: {'; '.join(said)}" for place, said in found.items())


def _said(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggestion(problem['loc'], model)}"
    said = _PLAIN.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    found = without_passwords(repr(problem["input"]))
    return f"{key}: {said} (found {found})" if key else said


def _suggestion(location: Location, model: type[BaseModel]) -> str:
    """What is accepted in the place of an unknown key, nearest first."""
    fields = annotation_at(model, location[:-1]).model_fields
    near = difflib.get_close_matches(str(location[-1]), fields, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f" ({hint}accepted here: {', '.join(fields)})"
