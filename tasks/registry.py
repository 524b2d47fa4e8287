"""MLflow: one registered model and one experiment per trajectory, a version per published fusion.

Nothing in MLflow is idempotent, so each step looks for its own mark (the tag ``ckptfuse.fusion``)
before it acts; under the workspace's lock that converges to one.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from ckptfuse.errors import CkptfuseError, PublicationError
from ckptfuse.passwords import without_passwords
from ckptfuse.records import FusionRecord, GateRecord, PlanRecord
from ckptfuse.service import Service
from tasks import artifacts
from tasks.artifacts import local_folder
from tasks.ledger import LedgerEntry
from tasks.log import log
from tasks.packaging import MODEL_FOLDER, library_tags, package
from tasks.tracking import require_answer, tracking_uri

FUSION_TAG = "ckptfuse.fusion"
_ROLE_TAG = "ckptfuse.role"
_PARENT_TAG = "mlflow.parentRunId"
_RUN_NAME_TAG = "mlflow.runName"
_PLAN, _GATE = "plan.json", "gate.json"
_NO_MODEL = "its logged model was deleted in MLflow"


@contextmanager
def registry_of(service: Service) -> Iterator["Registry"]:
    """The registry; whatever MLflow, its database, the network or a disk raise is PublicationError.

    A fault of ours is not: it must not pass for a server that is down.
    """
    try:
        require_answer(tracking_uri(service))
        yield Registry(service)
    except CkptfuseError:
        raise
    except Exception as error:
        is_mlflows = _came_through_mlflow(error)
        if not is_mlflows and not isinstance(error, OSError):
            raise
        said = f"MLflow: {type(error).__name__}: {error}" if is_mlflows else str(error)
        clean = without_passwords(said)
        # A log shows what an error came from, too.
        raise PublicationError(clean) from (error if clean == said else None)


def _came_through_mlflow(error: Exception) -> bool:
    """It has no base of its own for what its stores, databases and the network raise in it."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith("mlflow.") for frame in frames)


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
        return str(
            self.client.create_experiment(
                self.service.params.trajectory, artifact_location=self._artifact_location()
            )
        )

    def _artifact_location(self) -> str | None:
        """Where a new experiment's artifacts go; None leaves it to the server."""
        root = self.service.params.mlflow.artifact_root
        if root is not None:
            place = f"{root.rstrip('/')}/{self.service.params.trajectory}"
            return place if "://" in place else Path(place).as_uri()
        if tracking_uri(self.service).startswith("sqlite:"):
            return self.service.workspace.folder("mlartifacts").resolve().as_uri()
        return None

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

    # -- a version ---------------------------------------------------------------------------

    def register(self, decided: PlanRecord, verdict: GateRecord, entry: LedgerEntry) -> str:
        """The fusion's model version, with everything in place; the one that is there if so."""
        tags = version_tags(decided, verdict, entry)
        found = self.find_version(decided.fusion)
        if found is not None and self._location(self.version(found)) is None:
            log.warning("version %s lost its logged model; another takes its place", found)
            self.client.delete_model_version(self.name, found)
            found = None
        if found is not None:
            self._bring_up(found, tags)
            self._complete(found, decided.fusion)
            return found
        run = self.fusion_run(decided)
        self.client.log_dict(run, decided.model_dump(mode="json"), _PLAN)
        self.client.log_dict(run, verdict.model_dump(mode="json"), _GATE)
        model_id = self._logged_model(run, decided)
        self._registered_model()
        self.client.set_terminated(run)  # before the version: its being there says all is done
        version = self.client.create_model_version(
            self.name,
            source=f"models:/{model_id}",
            run_id=run,
            model_id=model_id,
            tags=tags | library_tags(),
            description=_description(decided, verdict),
        )
        return str(version.version)

    def _bring_up(self, version: str, tags: Mapping[str, str]) -> None:
        """A workspace or a ledger that was lost and made anew has other commits."""
        present = self.client.get_model_version(self.name, version).tags
        for tag, value in tags.items():
            if present.get(tag) != value:
                self.client.set_model_version_tag(self.name, version, tag, value)

    def _complete(self, version: str, fusion: str) -> None:
        """Files that somebody deleted from the artifact store."""
        merged = self.service.records.get(FusionRecord, fusion)
        lacking = None if merged is None else self.missing(version, merged.sizes)
        location = self._location(self.version(version))
        if lacking is not None and location is not None:
            log.warning("version %s lacks files, which are stored again: %s", version, lacking)
            self._store_files(fusion, location)

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

    def aliased(self) -> dict[str, str]:
        """Alias -> the fusion that it points to."""
        versions = self.client.search_model_versions(f"name = '{self.name}'")
        fusions = {str(v.version): v.tags.get(FUSION_TAG) for v in versions}
        found = {alias: fusions.get(version) for alias, version in self.aliases().items()}
        return {alias: str(fusion) for alias, fusion in found.items() if fusion is not None}

    def version(self, version: str) -> Any | None:
        """MLflow's ModelVersion; None when it is not there (any more)."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        return next((v for v in found if str(v.version) == version), None)

    def missing(self, version: str, files: Mapping[str, int]) -> str | None:
        """What a version lacks of its model's files (path -> size); None when it would load."""
        found = self.version(version)
        if found is None:
            return "it is not registered any more"
        location = self._location(found)
        if location is None:
            return _NO_MODEL
        sizes = artifacts.weight_sizes(location)
        for path, size in files.items():
            if sizes.get(path) != size:
                return f"its file {path} is not there at its {size:,} bytes"
        return None

    def _location(self, version: Any) -> str | None:
        """Where the packaged model of a version lies; None when somebody deleted it in MLflow."""
        from mlflow.exceptions import MlflowException

        try:
            model = self.client.get_logged_model(str(version.source).removeprefix("models:/"))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
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
        if location is None:
            raise PublicationError(f"version {version.version} of {self.name}: {_NO_MODEL}")
        folder = local_folder(location)
        if folder is not None:
            yield folder / MODEL_FOLDER
            return
        # Not in tmp/, which a writer sweeps.
        with tempfile.TemporaryDirectory(dir=self.service.workspace.folder("cache")) as copies:
            uri = f"{location}/{MODEL_FOLDER}"
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

    def _logged_model(self, run: str, decided: PlanRecord) -> str:
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
            self._store_files(decided.fusion, str(model.artifact_location))
            self.client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _store_files(self, fusion: str, location: str) -> None:
        """Package the merge that is in the workspace, and bring it to its place."""
        with tempfile.TemporaryDirectory(dir=self.service.workspace.folder("tmp")) as folder:
            packaged = Path(folder, "packaged")
            package(self.service.workspace.model(fusion), packaged)
            artifacts.store(location, packaged)


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
