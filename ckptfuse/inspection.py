"""Look through target text by hand: what the files hold, what is drawn of it, what is alike."""

from collections.abc import Mapping
from dataclasses import dataclass

from ckptfuse import packing
from ckptfuse.corpus import SPLITS, Corpus, Progress, Source, Split, documents_of, read_corpus
from ckptfuse.corpus.survey import survey
from ckptfuse.cut import Cut
from ckptfuse.params import CorpusParams
from ckptfuse.records import CorpusRecord
from ckptfuse.store import open_store
from ckptfuse.tokenizing import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Inspection:
    """``tokens``: domain -> split -> tokens within the budget; None without a tokenizer."""

    sources: Mapping[str, Source]
    contents: CorpusRecord
    tokens: Mapping[str, Mapping[Split, int]] | None


def inspect_corpus(
    params: CorpusParams,
    *,
    tokenizer: str | None = None,
    read: Progress = lambda size, of: None,
) -> Inspection:
    """Read all files of a corpus; ``read`` and what is raised are those of `read_corpus`."""
    corpus = read_corpus(params, read=read)
    contents = survey(corpus, params, examples=None)
    if tokenizer is None:
        return Inspection(corpus.sources, contents, None)
    loaded = load_tokenizer(open_store(tokenizer))
    return Inspection(corpus.sources, contents, _tokens(corpus, params, loaded))


def _tokens(
    corpus: Corpus, params: CorpusParams, tokenizer: Tokenizer
) -> dict[str, dict[Split, int]]:
    counts: dict[str, dict[Split, int]] = {name: {} for name in corpus.domains}
    for split in SPLITS:
        for name, documents in documents_of(corpus, split, params).items():
            counts[name][split] = 0
            if documents:
                built = packing.build(
                    {name: documents},
                    tokenizer,
                    digest="",
                    cut=Cut(1_024),
                    tokens={name: getattr(params.budget(name), split)},
                    tokens_per_document=params.tokens_per_document,
                )
                counts[name][split] = len(built.tokens)
    return counts
