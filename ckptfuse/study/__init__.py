"""Study: rules and window lengths compared on one finished trajectory.

choices    rules as they are written on a command line
cases      what a study holds: windows, and what each rule made of them
measure    one window: rules are asked, merges measured in memory, answers scored on audit
run        a whole trajectory; everything measured is a score record, so it can be resumed
compute    training that a merge stands for, less what scoring and merging cost
tables     means over windows with their errors, wins, regrets
page       Markdown with figures beside it; plain: JSON
"""

from ckptfuse.study.cases import IN, OUT, Case, Place, Study
from ckptfuse.study.choices import RuleChoice, parse_rules
from ckptfuse.study.page import as_markdown, write_study
from ckptfuse.study.plain import as_json
from ckptfuse.study.run import Plan, run_study

__all__ = [
    "IN",
    "OUT",
    "Case",
    "Place",
    "Plan",
    "RuleChoice",
    "Study",
    "as_json",
    "as_markdown",
    "parse_rules",
    "run_study",
    "write_study",
]
