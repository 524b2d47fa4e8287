"""Weight rules: from what was observed of a window to weights that sum to 1.

A rule is a pure function of an Observation. It answers ``Evaluate`` (merges whose loss it wants to
know first; each costs one merge in memory and one pass over the selection text) or ``Weights``.
When the merge with its weights has been measured too, it is asked once more, and may correct
itself. It never sees audit or report text: the type holds none.

    observation.py     what a rule is given, and its two answers
    registry.py        rules by name, options checked against the signature
    schedules.py       by position alone           perplexity.py   by loss alone
    searching.py       by trial and error          auto.py         by trying other rules
    calibrated.py      by a measured temperature, with energy.py and simplex.py

A rule of one's own is such a function in any module: ``rule.name: package.module:function``. See
examples/recency_and_quality.py and docs/method.md.
"""

from ckptfuse.rules import auto, calibrated, perplexity, schedules, searching
from ckptfuse.rules.observation import (
    Evaluate,
    EvaluatedMerge,
    Measurement,
    Observation,
    Prediction,
    Rule,
    Weights,
)
from ckptfuse.rules.registry import get_rule, rule

__all__ = [
    "Evaluate",
    "EvaluatedMerge",
    "Measurement",
    "Observation",
    "Prediction",
    "Rule",
    "Weights",
    "auto",
    "calibrated",
    "get_rule",
    "perplexity",
    "rule",
    "schedules",
    "searching",
]
