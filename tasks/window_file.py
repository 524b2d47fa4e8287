"""``window.yaml``: which checkpoints a fusion was made of, with their pinned weights."""

import os
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ckptfuse.errors import ConfigurationError
from ckptfuse.records import GateRecord, Member, PlanRecord

WINDOW_FILE = "window.yaml"


class PinnedCheckpoint(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    uri: str
    step: int
    fingerprint: str
    weight: float
    loss: float


class PinnedFusion(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    window: str
    step: int
    rule: str
    tokenizer: str
    gate_test: int
    gate_alpha: float


class WindowFile(BaseModel):
    """``checkpoints`` is keyed by ``step<N>``, oldest first; the last one is the newest.

    DVC reads this file and params.yaml as one, so their top-level names must differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    fusion: PinnedFusion
    checkpoints: dict[str, PinnedCheckpoint]

    @classmethod
    def of(cls, decided: PlanRecord, verdict: GateRecord) -> "WindowFile":
        return cls(
            fusion=PinnedFusion(
                id=decided.fusion,
                window=decided.window,
                step=decided.step,
                rule=decided.rule,
                tokenizer=decided.tokenizer,
                gate_test=verdict.test,
                gate_alpha=verdict.alpha,
            ),
            checkpoints={
                f"step{m.step}": PinnedCheckpoint(
                    name=m.name,
                    uri=m.uri,
                    step=m.step,
                    fingerprint=m.fingerprint,
                    weight=m.weight,
                    loss=m.loss,
                )
                for m in decided.members
            },
        )

    def plan(self, *, dtype: str | None) -> PlanRecord:
        """The plan record that this file pins."""
        members = [
            Member(signature="", **item.model_dump() | {"uri": _uri_now(item)})
            for item in self.checkpoints.values()
        ]
        return PlanRecord(
            window=self.fusion.window,
            step=self.fusion.step,
            rule=self.fusion.rule,
            tokenizer=self.fusion.tokenizer,
            members=members,
            ancillary=members[-1].fingerprint,
            dtype=dtype,
            fusion=self.fusion.id,
            notes={},
            params="",
        )

    def write(self, folder: Path) -> None:
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        (folder / WINDOW_FILE).write_text(text)


def _uri_now(item: PinnedCheckpoint) -> str:
    """Where the checkpoint lies now: ``CKPTFUSE_BUCKET`` stands in for a bucket that moved."""
    bucket = os.environ.get("CKPTFUSE_BUCKET")
    return f"{bucket.rstrip('/')}/{item.name}" if bucket else item.uri


def read_window_file(folder: Path) -> WindowFile:
    path = folder / WINDOW_FILE
    if not path.is_file():
        raise ConfigurationError(
            f"{path}: no such file; stages run in a ledger, at the tag of a fusion"
        )
    return parse_window_file(path.read_text(), str(path))


def parse_window_file(text: str, name: str) -> WindowFile:
    """The values of a ``window.yaml``; ``name`` says in an error which one it is."""
    try:
        return WindowFile.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigurationError(f"{name}: {error}") from error
