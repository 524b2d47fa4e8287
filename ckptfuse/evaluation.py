"""The figures that people quote: fusion, best single and newest checkpoint on the report text."""

from collections.abc import Mapping
from dataclasses import dataclass

from ckptfuse.gate import best_member
from ckptfuse.losses import Estimate, Losses, combine, perplexity
from ckptfuse.records import PlanRecord
from ckptfuse.service import Service, losses_of

MODELS = ("fusion", "best", "newest")


@dataclass(frozen=True)
class Evaluation:
    """Losses on the report split of the fusion and of the single checkpoints it is measured by."""

    steps: Mapping[str, int]
    losses: Mapping[str, Losses]
    weights: Mapping[str, float]

    def target(self, model: str) -> Estimate:
        return self.losses[model].target(self.weights)

    def domain(self, model: str, domain: str) -> Estimate:
        return self.losses[model].of(domain)

    @property
    def domains(self) -> tuple[str, ...]:
        return self.losses["fusion"].domains

    def gain(self, over: str) -> Estimate:
        """How much lower the fusion's target loss is, paired, in nats."""
        return combine(self.losses[over].minus(self.losses["fusion"]), self.weights)

    def domain_gains(self, over: str) -> dict[str, Estimate]:
        return self.losses[over].minus(self.losses["fusion"])

    def metrics(self) -> dict[str, object]:
        """Plain nested numbers, for metrics files and registries."""
        models = {
            model: {
                "step": self.steps[model],
                "loss": self.target(model).mean,
                "perplexity": perplexity(self.target(model).mean),
                "domains": {
                    name: {
                        "loss": self.domain(model, name).mean,
                        "perplexity": perplexity(self.domain(model, name).mean),
                    }
                    for name in self.domains
                },
            }
            for model in MODELS
        }
        gains = {
            over: {"loss": self.gain(over).mean, "standard_error": self.gain(over).standard_error}
            for over in ("best", "newest")
        }
        return {"report": models, "gain": gains}


def evaluate(service: Service, decided: PlanRecord) -> Evaluation:
    """Figures of a fusion from recorded scores; raises RecordError when one is missing."""
    best, newest = best_member(decided.members), decided.members[-1]
    ids = {"fusion": decided.fusion, "best": best.fingerprint, "newest": newest.fingerprint}
    return Evaluation(
        steps={"fusion": decided.step, "best": best.step, "newest": newest.step},
        losses={
            model: losses_of(service, model_id, decided.tokenizer, "report")
            for model, model_id in ids.items()
        },
        weights=service.scorer.target_weights,
    )
