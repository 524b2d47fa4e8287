"""Score by hand: no service, no parameters file, no records that stay."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckptfuse import blocks as blocks_module
from ckptfuse import jobs, packing
from ckptfuse.blocks import block_digest
from ckptfuse.checkpoints import longest_context, open_checkpoint
from ckptfuse.conversion import model_config
from ckptfuse.corpus import Corpus, Split, documents_to_score, read_corpus
from ckptfuse.cut import Cut
from ckptfuse.errors import CkptfuseError
from ckptfuse.imports import load_function
from ckptfuse.layouts import read_layout
from ckptfuse.params import CorpusParams, ScoringParams
from ckptfuse.protocol import BlockSet, CheckpointModel, Event, Input, Request, score_key
from ckptfuse.record_files import Records
from ckptfuse.records import DomainScore, ScoreRecord
from ckptfuse.scoring import numerics
from ckptfuse.store import FolderStore, open_store
from ckptfuse.tokenizing import load_tokenizer

DEFAULT_BLOCK_LENGTH = 1_024


@dataclass(frozen=True, slots=True)
class HandScore:
    """A checkpoint's scores by domain, and what they were measured with."""

    fingerprint: str
    domains: Mapping[str, DomainScore]
    split: str
    block_length: int
    dtype: str
    device: str


def score_once(
    checkpoint: str,
    corpora: Mapping[str, str],
    *,
    field: str = "text",
    split: Split | None = None,
    tokenizer: str | None = None,
    block_length: int | None = None,
    layout: Literal["packed", "rolling"] = "packed",
    stride: int | None = None,
    bos: Literal["document", "none"] = "document",
    device: str = "auto",
    attention: str = "sdpa",
    converter: str | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[Event], None] = lambda event: None,
) -> HandScore:
    """Score one checkpoint on target text, all of it unless ``split`` is given.

    ``block_length`` defaults to 1,024 tokens, or the model's longest context if that is shorter.
    """
    if converter is not None:
        load_function(converter, "converter")
    config = model_config(model) if model else read_layout(open_checkpoint(checkpoint)).config
    fitting = min(DEFAULT_BLOCK_LENGTH, longest_context(config) or DEFAULT_BLOCK_LENGTH)
    length = block_length or fitting
    params = ScoringParams.model_validate(
        {
            "device": device,
            "attention": attention,
            "converter": converter,
            "model": model,
            "trust_remote_code": trust_remote_code,
        }
    )
    cut = Cut(length, layout=layout, stride=stride, bos=bos)
    corpus_params = CorpusParams.of(corpora, field=field)
    corpus = read_corpus(corpus_params, whole=True)
    documents = documents_to_score(corpus, split, corpus_params) if split else corpus.domains
    jobs.prepare()  # while the text is tokenised
    source = load_tokenizer(
        open_store(tokenizer or model or checkpoint), trust_remote_code=trust_remote_code
    )
    with tempfile.TemporaryDirectory() as folder:
        name = _digest(corpus, source.digest, split, cut)
        built = packing.build(documents, source, digest=name, cut=cut)
        blocks_module.save(built, Path(folder, "blocks"))
        records = Records(FolderStore(Path(folder, "records")))
        request = Request(
            models=(CheckpointModel(input=Input(uri=checkpoint)),),
            blocks=(BlockSet(folder=f"{folder}/blocks", digest=name, split=split or "all"),),
            numerics=numerics(params),
            records=records.store.uri,
            batch_tokens=params.batch_tokens,
            converter=converter,
            model=model,
            trust_remote_code=trust_remote_code,
        )
        (answer,) = jobs.Here().run(request, gpus_per_job=1, progress=progress)
        if answer.failed is not None or answer.fingerprint is None:
            raise CkptfuseError(answer.failed.reason if answer.failed else "nothing was scored")
        key = score_key(model_id=answer.fingerprint, blocks=name, numerics=request.numerics)
        record = records.get(ScoreRecord, key)
        assert record is not None, "the job said that it had scored"
    return HandScore(
        fingerprint=answer.fingerprint,
        domains=record.domains,
        split=split or "all",
        block_length=length,
        dtype=request.numerics.dtype,
        device=request.numerics.device_class,
    )


def _digest(corpus: Corpus, tokenizer: str, split: Split | None, cut: Cut) -> str:
    return block_digest(
        corpus=corpus.digest,
        tokenizer=tokenizer,
        split=split or "all",
        cut=cut,
    )
