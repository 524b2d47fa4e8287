"""The target text in MLflow: a dataset for each domain, named by what was drawn of it."""

import json
from typing import TYPE_CHECKING

from ckptfuse.corpus import SPLITS, documents_of
from ckptfuse.digests import digest
from ckptfuse.service import Service
from ckptfuse.store import is_s3
from tasks.registry import Registry

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

#: MLflow keeps at most 36 characters.
_DIGEST_LENGTH = 32
_CONTEXT = "target text"


def log_corpus(registry: Registry, run: str) -> None:
    """Log the corpus as inputs of a run; those that are there stay one."""
    registry.client.log_inputs(run, datasets=_datasets(registry.service))


def _datasets(service: Service) -> list["DatasetInput"]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    corpus, params = service.scorer.corpus(), service.params.corpus
    by_split = {split: documents_of(corpus, split, params) for split in SPLITS}
    found = []
    for name, drawn in corpus.domains.items():
        source = corpus.sources[name]
        profile = {
            "corpus": corpus.digest,
            "drawn": {split: len(documents[name]) for split, documents in by_split.items()},
            "distinct": source.distinct,
            "bytes": source.bytes,
            "source_digest": source.digest,
        }
        dataset = Dataset(
            name=name,
            digest=digest([document.digest for document in drawn])[:_DIGEST_LENGTH],
            source_type="s3" if is_s3(source.uri) else "local",
            source=json.dumps({"uri": source.uri}),
            profile=json.dumps(profile),
        )
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", _CONTEXT)]))
    return found
