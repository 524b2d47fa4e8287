"""What was published: is it still in the ledger, and in MLflow, and is the champion the same?"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from ckptfuse.checks import Check, failed, ok, warning
from ckptfuse.checks.check import carried_out
from ckptfuse.errors import CkptfuseError
from ckptfuse.promotion import champion
from ckptfuse.published import find_publication, publications
from ckptfuse.records import RetirementRecord
from ckptfuse.service import Service
from tasks.aliases import astray, check_loadable
from tasks.registry import FUSION_TAG, registry_of
from tasks.tracking import tracking_uri
from tasks.version import ledger_of

TAGS, VERSIONS = "tags of the ledger", "versions in MLflow"
ALIAS, CHAMPION = "alias of the champion", "files of the champion"
_MEND = 'docs/operations.md, "When something is lost", tells how it comes back'
_SHOWN = 3


def published(service: Service, *, in_mlflow: bool) -> Iterator[Check]:
    """Of each a check, once there is something to look for; ``in_mlflow``: it answers."""
    known = publications(service)
    retired = service.records.all(RetirementRecord)
    kept = [record for record in known if record.fusion not in retired]
    if known:
        yield _all_there(TAGS, {r.tag: r.tag for r in known}, ledger_of(service).tags)
    if kept and in_mlflow:
        versions = _all_there(
            VERSIONS, {r.tag: r.fusion for r in kept}, lambda: _registered(service)
        )
        yield versions
        if versions.state == "ok" and (present := champion(service)) is not None:
            yield carried_out(ALIAS, lambda: _followed(service), _MEND)
            yield carried_out(CHAMPION, lambda: _loads(service, present.fusion), _MEND)


def _followed(service: Service) -> Check:
    with registry_of(service) as registry:
        found = astray(service, registry)
    if found is None:
        return ok(ALIAS, "it is where the records have it")
    return warning(ALIAS, str(found), "or promote the one that it points to, if that is to stay")


def _loads(service: Service, fusion: str) -> Check:
    chosen = find_publication(service, fusion)
    with registry_of(service) as registry:
        check_loadable(service, registry, chosen)
    return ok(CHAMPION, f"version {chosen.version} ({chosen.tag}) has all of its files")


def _all_there(name: str, wanted: Mapping[str, str], find: Callable[[], Collection[str]]) -> Check:
    """``wanted``: what a person calls it -> what is looked for among what is found."""
    try:
        found = find()
    except (CkptfuseError, OSError) as error:
        return failed(name, str(error), _MEND)
    except Exception as error:  # MLflow's, and its database's
        return failed(name, f"{type(error).__name__}: {error}", _MEND)
    lost = [called for called, sought in wanted.items() if sought not in found]
    if not lost:
        return ok(name, f"all {len(wanted)} that the records name are there")
    shown = ", ".join(lost[-_SHOWN:])
    return warning(name, f"{len(lost)} of {len(wanted)} are gone, last of them {shown}", _MEND)


def _registered(service: Service) -> set[str]:
    """Fusions that have a version. Makes no experiment, as `registry_of` would, nor a database."""
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = tracking_uri(service)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return set()
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    versions = client.search_model_versions(f"name = '{service.params.model_name}'")
    return {str(version.tags.get(FUSION_TAG)) for version in versions}
