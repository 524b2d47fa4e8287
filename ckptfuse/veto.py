"""A veto of the team's own: does the fusion answer items worse than the champion?

Any command, ``promotion.veto.command``, is called with a model folder and a path; it writes JSON
lines to that path, ``{"item": "arc_easy/12", "correct": 1}``, one for each item that it asked.
Losses say nothing of such items, so this test is one more and not the gate's; it can only keep a
fusion from becoming champion. Items that both or neither answer tell nothing: of the others, had
the two models the same skill, each would be won or lost with equal chance (McNemar 1947, exact)::

    p = P(Binomial(won + lost, 1/2) >= lost)

The veto is used where p <= promotion.veto.alpha.
"""

import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ckptfuse.digests import digest
from ckptfuse.errors import JobError
from ckptfuse.processes import end_with_parent
from ckptfuse.record_files import Arrays
from ckptfuse.records import VetoOutcome


class Answer(BaseModel):
    """One line of what a command writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    item: str
    correct: bool


#: Item -> whether it was answered.
Answers = dict[str, bool]


def veto_key(model: str, command: tuple[str, ...]) -> str:
    """Key of a model's answers."""
    return digest([model, list(command)])


def ask(command: tuple[str, ...], model: Path) -> Answers:
    """Run the command on a model folder; its process ends with ours.

    Raises JobError if it fails, or writes anything but one answer for each of at least one item.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answers.jsonl")
        try:
            done = subprocess.run(
                [*command, str(model), str(path)], check=False, preexec_fn=end_with_parent
            )
        except OSError as error:
            raise JobError(
                f"promotion.veto.command {command[0]!r} cannot be run: {error}"
            ) from error
        if done.returncode != 0:
            raise JobError(
                f"promotion.veto.command ({shlex.join(command)}) ended with status "
                f"{done.returncode} on {model}; the next `ckptfuse veto` tries again"
            )
        return _read(path)


def _read(path: Path) -> Answers:
    # Not splitlines: JSON may hold U+2028 and others of its line ends as they are.
    lines = path.read_text().split("\n") if path.is_file() else []
    answers: Answers = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            answer = Answer.model_validate_json(line)
        except ValidationError as error:
            raise JobError(
                f"promotion.veto.command wrote line {number} {line[:80]!r}; expected is "
                '{"item": "a name", "correct": 0 or 1}'
            ) from error
        if answer.item in answers:
            raise JobError(f"promotion.veto.command wrote two answers to item {answer.item!r}")
        answers[answer.item] = answer.correct
    if not answers:
        raise JobError("promotion.veto.command wrote no answers to the path that it was given")
    return answers


def to_arrays(answers: Answers) -> Arrays:
    return {
        "item": np.array(list(answers)),
        "correct": np.array(list(answers.values()), dtype=bool),
    }


def from_arrays(arrays: Arrays) -> Answers:
    return dict(zip(arrays["item"].tolist(), arrays["correct"].tolist(), strict=True))


def outcome(fusion: Answers, champion: Answers, *, against: str) -> VetoOutcome:
    """The paired test over the items that both were asked."""
    from scipy import stats

    both = fusion.keys() & champion.keys()
    won = sum(fusion[item] and not champion[item] for item in both)
    lost = sum(champion[item] and not fusion[item] for item in both)
    p_value = float(stats.binom.sf(lost - 1, won + lost, 0.5))
    return VetoOutcome(against=against, items=len(both), won=won, lost=lost, p_value=p_value)
