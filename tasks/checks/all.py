"""All that a deployment needs, one check after the other, cheap and fundamental ones first."""

from collections.abc import Iterator
from pathlib import Path

from ckptfuse.checks import Check, bucket, failed, gpu, ok, workspace
from ckptfuse.checks.check import carried_out
from ckptfuse.corpus.files import find_files
from ckptfuse.errors import CkptfuseError, ConfigurationError
from ckptfuse.params import CorpusParams, Params
from ckptfuse.service import open_service

CORPUS = "corpus"
PARAMETERS = "parameters"


def checks(params: Params) -> Iterator[Check]:
    """Each is yielded as soon as it is known."""
    found = None
    try:
        found = bucket.look(params)
    except (CkptfuseError, OSError) as error:
        mend = "correct `bucket` in params.yaml, or the credentials (docs/monitoring.md)"
        yield failed(bucket.READING, str(error), mend)
    if found is not None:
        yield from _of_bucket(found)
    yield carried_out(
        CORPUS, lambda: _corpus(params.corpus), "correct corpus.domains (docs/corpus.md)"
    )
    root = Path(params.workspace)
    model = found.size if found else None
    yield from _of_workspace(root, model, keeps_all=params.retention.last is None)
    yield gpu.gpu(params.scoring, model, root if root.is_dir() else None)
    yield from _of_servers(params, has_workspace=root.is_dir())


def _of_bucket(found: bucket.Found) -> Iterator[Check]:
    rights = "give the service the rights to list and to read (docs/monitoring.md)"
    yield carried_out(bucket.READING, lambda: bucket.reading(found), rights)
    yield carried_out(bucket.WRITING, lambda: bucket.writing(found.bucket), rights)
    yield carried_out(bucket.CLOCK, lambda: bucket.clock(found.bucket), rights)


def _corpus(params: CorpusParams) -> Check:
    files = {name: len(find_files(domain.path)) for name, domain in params.domains.items()}
    if not files:
        mend = "name the target text: corpus.domains in params.yaml (docs/corpus.md)"
        return failed(CORPUS, "no domain is named", mend)
    return ok(CORPUS, ", ".join(f"{name}: {count} files" for name, count in files.items()))


def _of_workspace(root: Path, model: int | None, *, keeps_all: bool) -> Iterator[Check]:
    try:
        yield from workspace.workspace(root)
        yield workspace.space(root, model, keeps_all=keeps_all)
    except OSError as error:
        mend = f"give this user the right to write to {root}, or correct `workspace`"
        yield failed(workspace.WRITES, f"{root}: {error}", mend)


def _of_servers(params: Params, *, has_workspace: bool) -> Iterator[Check]:
    from tasks.checks.artifacts import artifacts
    from tasks.checks.ledger import ledger
    from tasks.checks.prefect import prefect
    from tasks.checks.published import published
    from tasks.checks.registry import registry
    from tasks.deployments import GPUS

    yield from prefect(params.trajectory, GPUS, hands_over=params.execution == "deployments")
    try:
        service = open_service(params)
    except ConfigurationError as error:  # all below would be told of another's trajectory, say
        yield failed(PARAMETERS, str(error), "correct params.yaml, or the environment")
        return
    of_mlflow = list(registry(service))
    yield from of_mlflow
    yield from artifacts(service)
    if not has_workspace:  # told already; what lies in it is looked at once it is there
        return
    yield from ledger(service)
    yield from published(service, in_mlflow=all(check.state != "failed" for check in of_mlflow))
