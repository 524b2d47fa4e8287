"""What a checkpoint's name says: step, stage and tokens, by one table of conventions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ckptfuse.errors import ConfigurationError

#: What MLflow's database holds of a step: a date may be one, a hash of digits is none.
_LARGEST_STEP = 2**63 - 1
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

#: Folder names of the field, most specific first. Groups: step, stage, tokens, unit.
CONVENTIONS = (
    # OLMo
    r"(?:(?P<stage>stage\d+)-)?step[-_]?(?P<step>\d+)-tokens(?P<tokens>\d+(?:\.\d+)?)(?P<unit>[KMBT]?)",
    r"(?:(?P<stage>stage\d+)-)?step[-_]?(?P<step>\d+)(?:-unsharded|-hf)?",  # OLMo-core, torchtitan
    r"checkpoint-(?P<step>\d+)",  # Hugging Face Trainer
    r"iter_(?P<step>\d+)",  # Megatron-LM
    r"global_step_?(?P<step>\d+)",  # DeepSpeed, GPT-NeoX
    r"(?:ckpt|checkpoint|model)[-_]?(?P<step>\d+)",  # plain loops, nanochat
    r"(?P<step>\d+)",
)


@dataclass(frozen=True, slots=True)
class ParsedName:
    step: int
    stage: str | None = None
    tokens: int | None = None


def parse_name(name: str, pattern: str | None = None) -> ParsedName | None:
    """The step, stage and tokens in a folder's name; None when it is no checkpoint's name.

    ``pattern`` is a regular expression of the user's own with a group ``step`` (and, optionally,
    ``stage``, ``tokens`` and ``unit``) that replaces the table; it must match the whole name.
    """
    for convention in [pattern] if pattern else CONVENTIONS:
        match = re.fullmatch(convention, name, re.ASCII)
        if match:
            return _parsed(match.groupdict())
    return None


def _parsed(groups: Mapping[str, str | None]) -> ParsedName | None:
    """None where a pattern as wide as ``(?P<step>.+)`` caught something that is no step."""
    tokens, unit = groups.get("tokens"), groups.get("unit") or ""
    try:
        step = int(groups["step"] or "")
        if not 0 <= step <= _LARGEST_STEP:
            return None
        return ParsedName(
            step=step,
            stage=groups.get("stage"),
            tokens=None if tokens is None else round(float(tokens) * _UNITS[unit.upper()]),
        )
    except (ValueError, KeyError, OverflowError):
        return None


def check_pattern(pattern: str) -> str:
    """Refuse a pattern that is no regular expression or has no group ``step``."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ConfigurationError(f"{pattern!r} is no regular expression: {error}") from error
    if "step" not in groups:
        raise ConfigurationError(f"{pattern!r} has no group (?P<step>...)")
    return pattern
