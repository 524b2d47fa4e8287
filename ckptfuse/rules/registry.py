"""Rules by name: the built-in ones, and any function that can be imported."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ckptfuse.errors import RuleError
from ckptfuse.imports import load_function
from ckptfuse.rules.observation import Evaluate, Observation, Rule, Weights

#: A rule before its options are bound: they are its keyword-only arguments.
RuleFunction = Callable[..., Evaluate | Weights]
_RULES: dict[str, RuleFunction] = {}


def rule(name: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule by name."""

    def register(function: RuleFunction) -> RuleFunction:
        _RULES[name] = function
        return function

    return register


def get_rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule of this name, or of ``package.module:function``, with its options bound.

    Options are checked against the types that the function's signature names. Raises RuleError
    for a rule or an option that is unknown or cannot be used.
    """
    function = _find(name)
    chosen = _checked(name, function, options or {})

    def bound(observation: Observation) -> Evaluate | Weights:
        answer = function(observation, **chosen)
        vectors = answer.vectors if isinstance(answer, Evaluate) else (answer.weights,)
        for vector in vectors:
            _check_simplex(name, vector, len(observation))
        return answer

    return bound


def _find(name: str) -> RuleFunction:
    if name in _RULES:
        return _RULES[name]
    if ":" in name:
        return load_function(name, "rule.name")
    raise RuleError(
        f"rule.name {name!r} is unknown; there are {', '.join(sorted(_RULES))}, and "
        "package.module:function for one of your own"
    )


def _checked(name: str, function: RuleFunction, options: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    accepted = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    checked = {}
    for option, value in options.items():
        if option not in accepted:
            offers = ", ".join(accepted) or "no options"
            raise RuleError(f"rule {name!r} has no option {option!r}; it takes {offers}")
        annotation = accepted[option]
        kind = Any if annotation is inspect.Parameter.empty else annotation
        try:
            checked[option] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            problems = "; ".join(_problem(option, item) for item in error.errors())
            raise RuleError(f"rule {name!r}: {problems}") from error
    return checked


def _problem(option: str, error: Any) -> str:
    key = ".".join([option, *map(str, error["loc"])])
    return f"option {key} is {error['input']!r}: {error['msg']}"


def _check_simplex(name: str, vector: tuple[float, ...], count: int) -> None:
    ok = (
        len(vector) == count
        and all(weight >= 0 for weight in vector)
        and math.isclose(sum(vector), 1.0, abs_tol=1e-9)
    )
    if not ok:
        raise RuleError(
            f"rule {name!r} answered {list(vector)}: {count} weights, none negative, that sum to 1 "
            "are expected"
        )
