"""MLflow: one registered model and one experiment per trajectory, a version per published fusion.

Nothing in MLflow is idempotent, so each step looks for its own mark (the tag ``ckptfuse.fusion``)
before it acts; under the workspace's lock that converges to one. Weights are never copied: in a
local artifact store they are hard links, elsewhere one upload.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckptfuse.errors import CkptfuseError, PublicationError
from ckptfuse.evaluation import evaluate
from ckptfuse.gate import best_member
from ckptfuse.notes import ENERGY, domain_energies
from ckptfuse.records import CheckpointRecord, FusionRecord, GateRecord, PlanRecord, ScoreRecord
from ckptfuse.service import Service, losses_of, plans_of, target_loss
from tasks.ledger import LedgerEntry, link_tree

FUSION_TAG = "ckptfuse.fusion"
_ROLE_TAG = "ckptfuse.role"
_PARENT_TAG = "mlflow.parentRunId"
_RUN_NAME_TAG = "mlflow.runName"
_PLAN, _GATE = "plan.json", "gate.json"
_MODEL_FOLDER = "model"  # where mlflow.transformers expects the weights beside its MLmodel


#: Read before MLflow is told a URI: it then overwrites the variable, for a next service too.
_GIVEN_URI = os.environ.get("MLFLOW_TRACKING_URI")


def tracking_uri(service: Service) -> str:
    """The tracking server, or a sqlite file in the workspace."""
    given = service.params.mlflow.tracking_uri or _GIVEN_URI
    return given or f"sqlite:///{service.workspace.root.resolve()}/mlflow.db"


@contextmanager
def registry_of(service: Service) -> Iterator["Registry"]:
    """The registry; whatever MLflow, its database or the network raise is a PublicationError."""
    try:
        yield Registry(service)
    except CkptfuseError:
        raise
    except Exception as error:
        raise PublicationError(f"MLflow: {type(error).__name__}: {error}") from error


class Registry:
    """What the service does in MLflow for one trajectory."""

    def __init__(self, service: Service) -> None:
        import mlflow
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(tracking_uri(service))
        mlflow.set_registry_uri(tracking_uri(service))
        self.service = service
        self.client = MlflowClient()
        self.name = service.params.model_name
        self.experiment_id = self._experiment()

    # -- runs --------------------------------------------------------------------------------

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.service.params.trajectory)
        if found is not None:
            return str(found.experiment_id)
        local = tracking_uri(self.service).startswith("sqlite:")
        artifacts = self.service.workspace.folder("mlartifacts").resolve().as_uri()
        return str(
            self.client.create_experiment(
                self.service.params.trajectory, artifact_location=artifacts if local else None
            )
        )

    def _run(self, tag: str, value: str, tags: Mapping[str, str]) -> str:
        """The run that carries this tag, made if need be."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{tag}` = '{value}'")
        if found:
            return str(found[0].info.run_id)
        run = self.client.create_run(self.experiment_id, tags={tag: value, **tags})
        return str(run.info.run_id)

    def curves_run(self) -> str:
        """The long-lived run that holds the trajectory's curves."""
        return self._run(_ROLE_TAG, "curves", {_RUN_NAME_TAG: "trajectory"})

    def fusion_run(self, decided: PlanRecord) -> str:
        tags = {
            _PARENT_TAG: self.curves_run(),
            _RUN_NAME_TAG: f"step-{decided.step}",
            _ROLE_TAG: "fusion",
        }
        return self._run(FUSION_TAG, decided.fusion, tags)

    # -- curves ------------------------------------------------------------------------------

    def draw_curves(self) -> None:
        """Log every loss that is in the records and not yet in MLflow, by training step."""
        from mlflow.entities import Metric

        run = self.curves_run()
        wanted = list(self._curve_points())
        logged = {
            (name, metric.step)
            for name in {name for name, *_ in wanted}
            for metric in self.client.get_metric_history(run, name)
        }
        fresh = [
            Metric(name, value, round(modified * 1000), step)
            for name, value, step, modified in wanted
            if (name, step) not in logged and math.isfinite(value)
        ]
        for start in range(0, len(fresh), 1000):
            self.client.log_batch(run, metrics=fresh[start : start + 1000])

    def _curve_points(self) -> Iterable[tuple[str, float, int, float]]:
        """(metric, value, training step, when the checkpoint was written)."""
        service = self.service
        written = {}
        for checkpoint in service.records.all(CheckpointRecord).values():
            written[checkpoint.fingerprint] = checkpoint.modified
            point = (checkpoint.step, checkpoint.modified)
            loss = self._report_loss(checkpoint.fingerprint, checkpoint.tokenizer)
            if loss is not None:
                yield ("loss.raw", loss, *point)
                yield ("perplexity.raw", math.exp(loss), *point)
        for plan in plans_of(service).values():
            point = (plan.step, written.get(plan.ancillary, 0.0))
            best = self._report_loss(best_member(plan.members).fingerprint, plan.tokenizer)
            fusion = self._report_loss(plan.fusion, plan.tokenizer)
            if best is not None:
                yield ("loss.best_single", best, *point)
            if fusion is not None:
                yield ("loss.fusion", fusion, *point)
                yield ("perplexity.fusion", math.exp(fusion), *point)
            if ENERGY in plan.notes:
                yield (ENERGY, plan.notes[ENERGY], *point)
            for domain, energy in domain_energies(plan.notes).items():
                yield (f"{ENERGY}.{domain}", energy, *point)

    def _report_loss(self, model_id: str, tokenizer: str) -> float | None:
        if not self.service.records.has(
            ScoreRecord, self.service.scorer.key(model_id, tokenizer, "report")
        ):
            return None
        return target_loss(self.service, losses_of(self.service, model_id, tokenizer, "report"))

    # -- a version ---------------------------------------------------------------------------

    def register(
        self, decided: PlanRecord, verdict: GateRecord, fusion: FusionRecord, entry: LedgerEntry
    ) -> str:
        """The fusion's model version, with everything in place; the one that is there if so."""
        found = self.find_version(decided.fusion)
        if found is not None:
            return found
        run = self.fusion_run(decided)
        self._describe_run(run, decided, verdict)
        model_id = self._logged_model(run, decided, fusion)
        self._registered_model()
        self.client.set_terminated(run)  # before the version: its being there says all is done
        version = self.client.create_model_version(
            self.name,
            source=f"models:/{model_id}",
            run_id=run,
            model_id=model_id,
            tags=version_tags(decided, verdict, entry),
            description=_description(decided, verdict),
        )
        return str(version.version)

    def find_version(self, fusion: str) -> str | None:
        versions = self.client.search_model_versions(
            f"name = '{self.name}' and tags.`{FUSION_TAG}` = '{fusion}'"
        )
        return str(min(int(v.version) for v in versions)) if versions else None

    def set_alias(self, alias: str, version: str) -> None:
        self.client.set_registered_model_alias(self.name, alias, version)

    def aliases(self) -> dict[str, str]:
        """Alias -> version."""
        found = self.client.search_registered_models(f"name = '{self.name}'")
        return {name: str(v) for model in found for name, v in model.aliases.items()}

    def version(self, version: str) -> Any | None:
        """MLflow's ModelVersion; None when it is not there (any more)."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        return next((v for v in found if str(v.version) == version), None)

    def missing(self, version: str, files: Mapping[str, int]) -> str | None:
        """What a version lacks of its model's files (path -> size); None when it would load."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        found = self.version(version)
        if found is None:
            return "it is not registered any more"
        listed = get_artifact_repository(self._location(found)).list_artifacts(_MODEL_FOLDER)
        sizes = {str(f.path).removeprefix(f"{_MODEL_FOLDER}/"): f.file_size for f in listed}
        for path, size in files.items():
            if sizes.get(path) != size:
                return f"its file {path} is not there at its {size:,} bytes"
        return None

    def _location(self, version: Any) -> str:
        """Where the packaged model of a version lies."""
        model = self.client.get_logged_model(str(version.source).removeprefix("models:/"))
        return str(model.artifact_location)

    def fusion_records(self, fusion: str) -> tuple[object, object] | None:
        """The plan and the gate's verdict as a fusion's run holds them; None without a run."""
        from mlflow.artifacts import download_artifacts

        runs = self.client.search_runs([self.experiment_id], f"tags.`{FUSION_TAG}` = '{fusion}'")
        if not runs:
            return None
        with tempfile.TemporaryDirectory() as folder:
            places = [f"{runs[0].info.artifact_uri}/{name}" for name in (_PLAN, _GATE)]
            copies = [download_artifacts(artifact_uri=p, dst_path=folder) for p in places]
            plan, gate = (json.loads(Path(copy).read_bytes()) for copy in copies)
        return plan, gate

    @contextmanager
    def model_folder(self, version: Any) -> Iterator[Path]:
        """The weights' folder of a version, where it lies or, from afar, as a copy for a while."""
        from mlflow.artifacts import download_artifacts

        location = self._location(version)
        folder = local_folder(location)
        if folder is not None:
            yield folder / _MODEL_FOLDER
            return
        # Not in tmp/, which a writer sweeps.
        with tempfile.TemporaryDirectory(dir=self.service.workspace.folder("cache")) as copies:
            uri = f"{location}/{_MODEL_FOLDER}"
            yield Path(download_artifacts(artifact_uri=uri, dst_path=copies))

    # -- what is stored ----------------------------------------------------------------------

    def artifacts(self, fusion: str) -> list[str]:
        """URIs of the folders that hold a fusion's packaged model: one, or none any more."""
        return [str(model.artifact_location) for model in self._logged_models(fusion)]

    def delete(self, fusion: str) -> None:
        """Delete a fusion's version and its files; raises PublicationError if it has an alias."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        version = self.find_version(fusion)
        if version is not None:
            held = sorted(a for a, at in self.aliases().items() if at == version)
            if held:
                raise PublicationError(f"version {version} has the alias {held[0]}; it stays")
            self.client.delete_model_version(self.name, version)
        for model in self._logged_models(fusion):
            get_artifact_repository(model.artifact_location).delete_artifacts()
            self.client.delete_logged_model(model.model_id)

    def _logged_models(self, fusion: str) -> list[Any]:
        return list(
            self.client.search_logged_models(
                [self.experiment_id], f"tags.`{FUSION_TAG}` = '{fusion}'"
            )
        )

    def _registered_model(self) -> None:
        if not self.client.search_registered_models(f"name = '{self.name}'"):
            text = f"Fused checkpoints of {self.service.params.trajectory}, by ckptfuse."
            self.client.create_registered_model(self.name, description=text)

    def _describe_run(self, run: str, decided: PlanRecord, verdict: GateRecord) -> None:
        from mlflow.entities import Metric, Param

        figures = evaluate(self.service, decided)
        values = {
            **decided.notes,
            "loss.fusion": figures.target("fusion").mean,
            "loss.best_single": figures.target("best").mean,
            "loss.newest": figures.target("newest").mean,
            "gain.best_single": figures.gain("best").mean,
            "gain.newest": figures.gain("newest").mean,
        }
        for name, gain in figures.domain_gains("newest").items():
            values[f"gain.newest.{name}"] = gain.mean
        params = {
            "rule": decided.rule,
            "window": ", ".join(str(member.step) for member in decided.members),
            "weights": ", ".join(f"{member.weight:.4f}" for member in decided.members),
            "gate": verdict.verdict,
        }
        self.client.log_batch(
            run,
            metrics=[Metric(k, v, 0, decided.step) for k, v in values.items() if math.isfinite(v)],
            params=[Param(key, value) for key, value in params.items()],
        )
        self.client.log_dict(run, decided.model_dump(mode="json"), _PLAN)
        self.client.log_dict(run, verdict.model_dump(mode="json"), _GATE)

    def _logged_model(self, run: str, decided: PlanRecord, fusion: FusionRecord) -> str:
        """The id of the model with its files in the artifact store; finished if it was begun."""
        found = self._logged_models(decided.fusion)
        model = (
            found[0]
            if found
            else self.client.create_logged_model(
                self.experiment_id,
                name=f"step-{decided.step}",
                source_run_id=run,
                tags={FUSION_TAG: decided.fusion},
            )
        )
        if str(model.status) != "READY":
            with tempfile.TemporaryDirectory(dir=self.service.workspace.folder("tmp")) as folder:
                packaged = Path(folder, "packaged")
                package(Path(fusion.folder), packaged)
                self._store(model, packaged)
            self.client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _store(self, model: Any, packaged: Path) -> None:
        """Into the artifact store: by hard links where it is a folder of ours, else an upload."""
        folder = local_folder(str(model.artifact_location))
        if folder is not None:
            link_tree(packaged, folder)
        else:
            self.client.log_model_artifacts(model.model_id, str(packaged))


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location names; None when it is no folder of this machine."""
    if location.startswith("file://"):
        return Path(location.removeprefix("file://"))
    return Path(location) if location.startswith("/") else None


def package(model: Path, target: Path) -> None:
    """An MLflow model folder around ``model``'s weights, which are linked and never loaded."""
    import mlflow.transformers
    import torch
    import transformers
    from huggingface_hub import ModelCard
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    weights = {path for path in model.iterdir() if path.suffix == ".safetensors"}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for path in set(model.iterdir()) - weights:
            os.link(path, Path(folder, path.name))
        text = Schema([ColSpec("string")])
        mlflow.transformers.save_model(
            folder,
            str(target),
            task="text-generation",
            model_card=ModelCard((model / "README.md").read_text()),
            signature=ModelSignature(inputs=text, outputs=text),
            pip_requirements=[
                f"mlflow=={mlflow.__version__}",
                f"torch=={torch.__version__.partition('+')[0]}",
                f"transformers=={transformers.__version__}",
            ],
        )
    for path in weights:
        os.link(path, target / _MODEL_FOLDER / path.name)
    # MLflow's note that it found no licence, with the path of our temporary folder.
    (target / "LICENSE.txt").unlink(missing_ok=True)
    described = Model.load(str(target))
    described.model_size_bytes = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    described.save(str(target / "MLmodel"))
    if not (target / _MODEL_FOLDER / "config.json").is_file():
        raise PublicationError(f"mlflow.transformers laid no model in {target / _MODEL_FOLDER}")


def version_tags(decided: PlanRecord, verdict: GateRecord, entry: LedgerEntry) -> dict[str, str]:
    used = [member for member in decided.members if member.weight]
    tags = {
        FUSION_TAG: decided.fusion,
        "ckptfuse.step": str(decided.step),
        "ckptfuse.steps": " ".join(str(member.step) for member in used),
        "ckptfuse.weights": " ".join(f"{member.weight:.6f}" for member in used),
        "ckptfuse.fingerprints": " ".join(member.fingerprint[:16] for member in used),
        "ckptfuse.rule": decided.rule,
        "ckptfuse.git_tag": entry.tag,
        "ckptfuse.git_commit": entry.commit,
        "ckptfuse.dvc_hash": entry.weights_hash,
    }
    for item in verdict.comparisons:
        tags[f"ckptfuse.gain_over_{item.against}"] = f"{item.gain:.6f}"
    return tags


def _description(decided: PlanRecord, verdict: GateRecord) -> str:
    used = [member for member in decided.members if member.weight]
    steps = ", ".join(f"{member.step} ({member.weight:.3f})" for member in used)
    return (
        f"Fusion at step {decided.step} of {len(used)} checkpoints by rule `{decided.rule}`: "
        f"{steps}. Gate: {verdict.reason}."
    )
