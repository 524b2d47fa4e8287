"""Rules as they are written on a command line: ``uniform,ema(alpha=0.3),calibrated``."""

import re
from dataclasses import dataclass

import yaml

from ckptfuse.errors import RuleError
from ckptfuse.rules import Rule, get_rule

DEFAULT_RULES = (
    "latest,best,uniform,linear,ema,minus-sqrt,inverse-perplexity,softmax,calibrated"  # all cheap
)
_BETWEEN = re.compile(r",(?![^(]*\))")  # a comma that is not in parentheses
_WRITTEN = re.compile(r"(?P<name>[^()\s]+)(?:\((?P<options>[^()]*)\))?")


@dataclass(frozen=True, slots=True)
class RuleChoice:
    """A rule with its options bound, and how it was written."""

    label: str
    rule: Rule


def parse_rules(text: str) -> tuple[RuleChoice, ...]:
    """Rules between commas, options as NAME(KEY=VALUE, ...); each once.

    Raises RuleError for what is not written so, and for unknown rules and options.
    """
    written = [part.strip() for part in _BETWEEN.split(text)]
    return tuple(RuleChoice(label, _rule(label)) for label in dict.fromkeys(written))


def _rule(label: str) -> Rule:
    match = _WRITTEN.fullmatch(label)
    if match is None:
        raise RuleError(f"rule {label!r}: NAME or NAME(KEY=VALUE, ...) is expected")
    options = {}
    for item in (match["options"] or "").split(","):
        key, equals, value = item.partition("=")
        if item.strip():
            if not equals:
                raise RuleError(f"rule {label!r}: option {item.strip()!r} is not KEY=VALUE")
            options[key.strip()] = yaml.safe_load(value)
    return get_rule(match["name"], options)
