"""What a corpus holds: per domain and split the documents, and those nearly alike across splits.

Near-duplicates are reported, not removed. A rule fits a handful of weights to selection, so a copy
of an audit document there flatters the fusion by little; and a corpus that left documents out by
similarity would be another one with another release of the library that finds them, or when a
document far away is added. Whoever wants them gone removes them from the files.
"""

from collections import Counter
from collections.abc import Sequence

from ckptfuse.corpus.draw import SPLITS, Corpus, Split, documents_of
from ckptfuse.corpus.near_duplicates import Placed, Twins, twins_across_splits
from ckptfuse.params import CorpusParams
from ckptfuse.records import CorpusRecord, NearDuplicates, PlacedDocument, SplitContents

EXAMPLES = 5
_BEGINNING = 60  # characters


def survey(
    corpus: Corpus, params: CorpusParams, *, examples: int | None = EXAMPLES
) -> CorpusRecord:
    """Count what was drawn for each split; looks at every word of it: about 2 s for 5 MB.

    ``examples`` is how many pairs of near-duplicates are kept, the closest first; None: all.
    """
    placed = [
        Placed(name, split, document)
        for split in SPLITS
        for name, documents in documents_of(corpus, split, params).items()
        for document in documents
    ]
    twins = twins_across_splits(placed)
    return CorpusRecord(
        corpus=corpus.digest,
        domains={
            name: {split: _contents(name, split, placed, twins) for split in SPLITS}
            for name in corpus.domains
        },
        examples=_examples(twins)[:examples],
    )


def near_duplicates_of(record: CorpusRecord) -> list[str]:
    """A sentence for each domain and split with near-duplicates in another split."""
    return [
        f"{name}: {count} of {held.documents} {split} documents have a near-duplicate in {other}"
        for name, splits in record.domains.items()
        for split, held in splits.items()
        for other, count in held.near_duplicates.items()
    ]


def _contents(
    domain: str, split: Split, placed: Sequence[Placed], twins: Sequence[Twins]
) -> SplitContents:
    mine = [p.document for p in placed if (p.domain, p.split) == (domain, split)]
    found = Counter(t.other.split for t in twins if (t.one.domain, t.one.split) == (domain, split))
    return SplitContents(
        documents=len(mine),
        bytes=sum(document.size for document in mine),
        near_duplicates={other: found[other] for other in SPLITS if found[other]},
    )


def _examples(twins: Sequence[Twins]) -> list[NearDuplicates]:
    """Each pair once, the closest first."""
    pairs = {
        frozenset((pair.one.document.digest, pair.other.document.digest)): pair
        for pair in sorted(twins, key=lambda pair: (-pair.similarity, pair.one.document.digest))
    }
    return [
        NearDuplicates(similarity=t.similarity, one=_place(t.one), other=_place(t.other))
        for t in pairs.values()
    ]


def _place(placed: Placed) -> PlacedDocument:
    return PlacedDocument(
        domain=placed.domain,
        split=placed.split,
        digest=placed.document.digest,
        beginning=" ".join(placed.document.text[: 4 * _BEGINNING].split())[:_BEGINNING],
    )
