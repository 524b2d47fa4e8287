"""What a trajectory waits for at present, and why: sentences for a person.

From the records and from what the last look left (looks.py). Of all that lies outside of the
workspace only the corpus is asked for.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from ckptfuse.errors import ConfigurationError, StoreError
from ckptfuse.looks import Look, Pending
from ckptfuse.overview import Overview, Row
from ckptfuse.plan import SUPERSEDED
from ckptfuse.service import Service
from ckptfuse.steps.look import look_file

SHOWN = 5  # of a kind; a bucket may hold hundreds


def corpus_of_last_look(service: Service) -> str | None:
    """Where the corpus cannot be read, go on with the digest that the last look had.

    Of a service that only reads records from here on. Returns the sentence that tells of it, None
    where the corpus is there; raises what reading it does where no look has left a digest.
    """
    scorer = service.scorer
    try:
        scorer.corpus_digest()
        _ = scorer.given_tokenizer
    except (StoreError, ConfigurationError) as error:
        last = look_file(service).last()
        if last is None or last.corpus is None:
            raise
        scorer.assume(last.corpus, last.tokenizer)
        return f"the corpus cannot be read, losses are on that of the last look: {error}"
    return None


def present_notes(seen: Overview) -> list[str]:
    """What was declined of late and what waits, each with its reason; of many the newest."""
    return [*_not_fused(seen.rows), *_waits_for_veto(seen.rows), *left_by(seen.look)]


def _not_fused(rows: Sequence[Row]) -> list[str]:
    """Of windows that a newer one superseded there is no more to say than the table does."""
    left = [row for row in rows if row.verdict in ("declined", "skipped")]
    said = [row for row in left if not row.reason.startswith(SUPERSEDED)][-SHOWN:]
    return [f"step {row.step} was {row.verdict}: {row.reason}" for row in said]


def _waits_for_veto(rows: Sequence[Row]) -> list[str]:
    waiting = [row.step for row in rows if row.verdict == "candidate"]
    if not waiting:
        return []
    return [f"step {waiting[-1]} waits for its veto: `ckptfuse veto`, then a look, decides on it"]


def left_by(look: Look | None) -> list[str]:
    """What the last look could not use or finish, under a line that says when that was."""
    if look is None:
        return []
    said = [
        *_pending(look.held, "could not be read or scored"),
        *_pending(look.incomplete, "is not complete yet"),
    ]
    if look.waits is not None:
        said.append(f"publication waits for the next look: {look.waits}")
    if said:
        began = datetime.fromtimestamp(look.begun, UTC)
        said.insert(0, f"at the last look ({began:%Y-%m-%d %H:%M} UTC):")
    return said


def _pending(left: Sequence[Pending], what: str) -> list[str]:
    """The newest, which are last."""
    said = [f"{item.name} {what}: {item.reason}" for item in left[-SHOWN:]]
    if more := len(left) - len(said):
        said.append(f"... and so {more} before these")
    return said
