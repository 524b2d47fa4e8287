"""Parameters for a trajectory and text that were named on a command line.

What is not named comes from a params.yaml where there is one, else from the defaults.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from ckptfuse.checkpoints import CONFIG, longest_context
from ckptfuse.digests import digest
from ckptfuse.errors import ConfigurationError
from ckptfuse.names import parse_name
from ckptfuse.params import CorpusParams, Domain, DomainBudget, Params, ScoringParams, is_plain
from ckptfuse.store import Store, absolute_uri, open_store

#: Tokens of text out of distribution in the selection split, where it decides nothing.
IDLE_TOKENS = 2_048


def params_given(
    base: Params,
    bucket: str,
    corpora: Mapping[str, str],
    *,
    outside: Mapping[str, str] | None = None,
) -> Params:
    """``base`` with this bucket, and these domains if there are any.

    Domains ``outside`` of the training distribution are scored and shown, and set no weight.
    Blocks are as long as the model's longest context, if that is shorter than the default and
    ``base`` has no length of its own. Raises ConfigurationError, and StoreError for a bucket that
    is not there.
    """
    uri = absolute_uri(bucket)
    corpus = _corpus(base.corpus, corpora, outside or {})
    scoring = base.scoring
    usual = ScoringParams.model_fields["block_length"].default
    if scoring.block_length == usual:
        fitting = min(usual, _longest_context(open_store(uri), base.watch.pattern) or usual)
        scoring = scoring.model_copy(update={"block_length": fitting})
    trajectory = base.trajectory
    if trajectory == Params.model_fields["trajectory"].default:
        trajectory = trajectory_name(uri) or trajectory
    return base.model_copy(
        update={"bucket": uri, "corpus": corpus, "scoring": scoring, "trajectory": trajectory}
    )


def trajectory_name(uri: str) -> str | None:
    """The bucket's last part, where that can name a trajectory."""
    name = uri.rstrip("/").rpartition("/")[2]
    return name if is_plain(name, also=".") else None


def study_folder(uri: str) -> Path:
    """A folder of one bucket's own, below the present one."""
    return Path("workspace", "study", f"{trajectory_name(uri) or 'bucket'}-{digest(uri)[:8]}")


def _corpus(
    base: CorpusParams, corpora: Mapping[str, str], outside: Mapping[str, str]
) -> CorpusParams:
    if both := sorted(corpora.keys() & outside.keys()):
        raise ConfigurationError(f"domain {both[0]!r} is named both in and out of distribution")
    named = CorpusParams.of({name: absolute_uri(path) for name, path in corpora.items()}).domains
    idle = {
        name: Domain(
            path=absolute_uri(path), weight=0.0, tokens=DomainBudget(selection=IDLE_TOKENS)
        )
        for name, path in outside.items()
    }
    try:
        return CorpusParams.model_validate(
            {**base.model_dump(), "domains": {**(named or base.domains), **idle}}
        )
    except ValidationError as error:
        problems = "; ".join(problem["msg"] for problem in error.errors())
        raise ConfigurationError(f"corpus {dict(outside)}: {problems}") from error


def _longest_context(bucket: Store, pattern: str | None) -> int | None:
    """The positions that a checkpoint's model knows, where its configuration says it."""
    for entry in bucket.list(""):
        name, _, path = entry.path.partition("/")
        if path == CONFIG and parse_name(name, pattern) is not None:
            try:
                return longest_context(json.loads(bucket.read(entry.path)))
            except (ValueError, AttributeError):  # no model's, or half written: try another
                continue
    return None
