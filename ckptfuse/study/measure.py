"""One window of a study: every rule is asked, and its merge scored on audit text.

    rules that need nothing measured --\
    equal weights ----------------------+--one job: merged in memory, selection and audit
    the others --questions--> jobs on selection --weights--> one job on audit

All of it is score records, so that what was measured before is not measured again.
"""

from collections.abc import Sequence

from ckptfuse.corpus import Split
from ckptfuse.deciding import decide
from ckptfuse.losses import Losses
from ckptfuse.records import CheckpointRecord
from ckptfuse.rules import Measurement, Observation, Weights, get_rule
from ckptfuse.scoring import TokenizerSource
from ckptfuse.service import Service, losses_of
from ckptfuse.steps.score import raise_failed
from ckptfuse.steps.spikes import spikes_among
from ckptfuse.steps.weigh import evaluator, merge_model, observe, spec_of
from ckptfuse.study.cases import Case, Place, Reference, fall_over
from ckptfuse.study.choices import RuleChoice
from ckptfuse.window import Window

Vector = tuple[float, ...]

REFERENCE_RULES: dict[Reference, str] = {"newest": "latest", "best": "best", "uniform": "uniform"}


class Bench:
    """Merges of one window, measured once each."""

    def __init__(self, service: Service, members: Sequence[CheckpointRecord]) -> None:
        self._service = service
        self.members = members
        self.tokenizer: TokenizerSource = service.scorer.tokenizer(members[-1].uri)
        self.seen: Observation = observe(service, members)
        self.evaluate = evaluator(service, members, self.tokenizer)

    def score(self, vectors: Sequence[Vector], splits: Sequence[Split]) -> None:
        """Score merges on these splits, those that have not been, in one job."""
        scorer, digest = self._service.scorer, self.tokenizer.digest
        models = [
            merge_model(self._service, self.members, vector)
            for vector in dict.fromkeys(vectors)
            if any(scorer.losses(self.model(vector), digest, split) is None for split in splits)
        ]
        for answer in scorer.score(models, self.tokenizer, splits) if models else []:
            raise_failed(answer.failed)

    def model(self, vector: Vector) -> str:
        """What the merge's scores are filed under; all weight on one is that checkpoint."""
        spec = spec_of(self._service, self.members, vector)
        return spec.used[0][0] if spec.is_single else spec.id

    def audit(self, vector: Vector) -> Losses:
        """Raises RecordError when the merge was not scored on audit."""
        return losses_of(self._service, self.model(vector), self.tokenizer.digest, "audit")

    def ask(self, choice: RuleChoice) -> tuple[Weights, int]:
        """The rule's last word, and how many merges it had measured beside its own."""
        asked: set[Vector] = set()

        def evaluate(vectors: tuple[Vector, ...]) -> Sequence[Measurement]:
            asked.update(vectors)
            return self.evaluate(vectors)

        def recall(vector: Vector) -> Measurement:
            return self.evaluate((vector,))[0]

        decision = decide(choice.rule, self.seen, evaluate=evaluate, recall=recall)
        mine = decision.answer.weights
        measured = {merge.weights for merge in decision.seen.merges}
        return decision.answer, len((measured - {mine}) | asked)


def study_window(service: Service, window: Window, choices: Sequence[RuleChoice]) -> Place:
    """Raises what the evaluation of a merge raises."""
    bench = Bench(service, window.members)
    references = {name: _at_once(rule, bench.seen) for name, rule in REFERENCE_RULES.items()}
    first = [choice.rule(bench.seen) for choice in choices]
    known = [answer.weights for answer in first if isinstance(answer, Weights)]
    bench.score([*references.values(), *known], ("selection", "audit"))
    answers = [bench.ask(choice) for choice in choices]
    bench.score([answer.weights for answer, _ in answers], ("audit",))
    marks = spikes_among(service, window.members)
    return Place(
        steps=bench.seen.steps,
        spikes=tuple(m.step for m in window.members if m.fingerprint in marks),
        fall=fall_over(bench.seen.steps, bench.seen.losses.tolist()),
        references={name: bench.audit(vector) for name, vector in references.items()},
        cases=tuple(
            Case(choice.label, answer.weights, evaluations, answer.no_gain,
                 bench.audit(answer.weights))
            for choice, (answer, evaluations) in zip(choices, answers, strict=True)
        ),
    )  # fmt: skip


def _at_once(rule: str, seen: Observation) -> Vector:
    answer = get_rule(rule)(seen)
    assert isinstance(answer, Weights), "these rules need nothing measured"
    return answer.weights
