"""What a scoring job is asked: this machine's numerics, blocks on disk, models without records."""

import math
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from ckptfuse import blocks as blocks_module
from ckptfuse import conversion, packing
from ckptfuse.blocks import block_digest
from ckptfuse.corpus import SPLITS, Corpus, KeptCorpus, Progress, Split, documents_to_score
from ckptfuse.errors import CorpusError
from ckptfuse.jobs import ModelScores, Runner
from ckptfuse.losses import Estimate, Losses, combine
from ckptfuse.meter import Meter
from ckptfuse.params import Params, ScoringParams
from ckptfuse.protocol import (
    PROTOCOL,
    BlockSet,
    Event,
    Model,
    Numerics,
    Reading,
    Request,
    score_key,
)
from ckptfuse.record_files import Records
from ckptfuse.records import CheckpointRecord, DomainScore, ScoreRecord
from ckptfuse.store import open_store, throttle
from ckptfuse.tokenizing import load_tokenizer, tokenizer_files_digest


def numerics(params: ScoringParams) -> Numerics:
    """What ``auto`` means on this machine: bfloat16 on a GPU, float32 on a CPU."""
    device = params.device_class
    dtype = params.dtype if params.dtype != "auto" else _default_dtype(device)
    return Numerics.model_validate(
        {
            "dtype": dtype,
            "attention": params.attention,
            "device_class": device,
            "converter": conversion.identity(params.converter, params.model),
            "engine": shlex.join(params.command) or None,
            "protocol": PROTOCOL[device],
        }
    )


def _default_dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """A tokenizer by the digest of its files, and a place where they lie."""

    digest: str
    uri: str


class Scorer:
    """Scores models on a corpus's splits, with everything that is known kept on disk.

    ``folder`` holds blocks and remembered digests, both of which can be made again at any time.
    """

    def __init__(self, params: Params, records: Records, folder: Path, runner: Runner) -> None:
        self.params = params
        self.records = records
        self.folder = folder
        self.runner = runner
        self.numerics = numerics(params.scoring)
        self.meter = Meter(folder / "scoring.jsonl")
        self._kept = KeptCorpus(params.corpus, folder / "corpora")

    @property
    def target_weights(self) -> dict[str, float]:
        return {name: domain.weight for name, domain in self.params.corpus.domains.items()}

    def tokenizer(self, checkpoint_uri: str) -> TokenizerSource:
        """The tokenizer that scores this checkpoint; raises CorpusError without one."""
        return self.given_tokenizer or _tokenizer_at(checkpoint_uri)

    @cached_property
    def given_tokenizer(self) -> TokenizerSource | None:
        """The one that parameters name for all checkpoints; None where each is scored by its own.

        Raises CorpusError where there are no files of one.
        """
        uri = self.params.corpus.tokenizer or self.params.scoring.model
        return None if uri is None else _tokenizer_at(uri)

    def tokenizer_of(self, record: CheckpointRecord) -> str:
        """Digest of the tokenizer that scores a checkpoint now: parameters may have changed."""
        if self.given_tokenizer is not None:
            return self.given_tokenizer.digest
        return record.own_tokenizer or record.tokenizer

    def corpus(self) -> Corpus:
        return self._kept.corpus

    def prepare_corpus(self, read: Progress) -> None:
        """Read the corpus's files now, if need be; ``read`` is told how it goes on."""
        self._kept.prepare(read)

    def corpus_digest(self) -> str:
        """The corpus's digest; for files that were read before, from their sizes and versions."""
        return self._kept.digest

    def assume(self, corpus: str, tokenizer: str | None) -> None:
        """Go by these digests without reading any text: to look up what was scored, not to score.

        ``tokenizer`` is the one that parameters name for all checkpoints, if they do.
        """
        self._kept.digest = corpus
        self.given_tokenizer = TokenizerSource(tokenizer, "") if tokenizer else None

    def block_digest(self, tokenizer: str, split: Split) -> str:
        return block_digest(
            corpus=self.corpus_digest(),
            tokenizer=tokenizer,
            split=split,
            cut=self.params.scoring.cut,
        )

    def block_set(self, tokenizer: TokenizerSource, split: Split) -> BlockSet:
        """The split's blocks on disk, tokenised now if they are not there."""
        name = self.block_digest(tokenizer.digest, split)
        folder = self.folder / "blocks" / name
        if not (folder / "blocks.json").is_file():
            domains = documents_to_score(self.corpus(), split, self.params.corpus)
            built = packing.build(
                domains,
                load_tokenizer(
                    open_store(tokenizer.uri),
                    trust_remote_code=self.params.scoring.trust_remote_code,
                ),
                digest=name,
                cut=self.params.scoring.cut,
                tokens={n: getattr(self.params.corpus.budget(n), split) for n in domains},
                tokens_per_document=self.params.corpus.tokens_per_document,
            )
            blocks_module.save(built, folder)
        return BlockSet(folder=str(folder), digest=name, split=split)

    def score(
        self,
        models: Sequence[Model],
        tokenizer: TokenizerSource,
        splits: Sequence[Split] = SPLITS,
        *,
        progress: Callable[[Event], None] = lambda event: None,
    ) -> list[ModelScores]:
        """Score models on the given splits, in one job for each GPU or in one on a CPU."""
        self.runner.prepare()  # while the text is tokenised
        request = Request(
            models=tuple(models),
            blocks=tuple(self.block_set(tokenizer, split) for split in splits),
            numerics=self.numerics,
            records=self.records.store.uri,
            batch_tokens=self.params.scoring.batch_tokens,
            threads=self.params.scoring.threads,
            trust_remote_code=self.params.scoring.trust_remote_code,
            converter=self.params.scoring.converter,
            model=self.params.scoring.model,
            reading=_reading(),
            split=self.params.scoring.gpus_per_job > 1,
            command=self.params.scoring.command,
            scratch=str(self.folder),
        )
        gpus = self.params.scoring.gpus_per_job
        answers = self.runner.run(request, gpus, progress=progress)
        scored = [answer.seconds for answer in answers if answer.scored and answer.scored.tokens]
        failed = [answer.seconds for answer in answers if answer.failed]
        self.meter.add(hours=sum(scored) * gpus / 3600, models=len(scored))
        if failed:  # it costs as much, and tells nothing of what others will
            self.meter.add(hours=sum(failed) * gpus / 3600, models=0)
        return answers

    def affordable(self) -> int | None:
        """How many more models the budget of the day allows; None without one."""
        budget = self.params.scoring.hours_per_day
        return None if budget is None else self.meter.affordable(budget, time.time())

    def key(self, model_id: str, tokenizer: str, split: Split) -> str:
        blocks = self.block_digest(tokenizer, split)
        return score_key(model_id=model_id, blocks=blocks, numerics=self.numerics)

    def is_scored(self, model_id: str, tokenizer: str) -> bool:
        """Whether every split of this model has its record."""
        keys = (self.key(model_id, tokenizer, split) for split in SPLITS)
        return all(self.records.has(ScoreRecord, key) for key in keys)

    def scored_among(self, checkpoints: Iterable[CheckpointRecord]) -> frozenset[str]:
        """Signatures of those whose every split has its record, from one listing of records."""
        known = self.records.keys(ScoreRecord)

        @cache
        def blocks(tokenizer: str) -> list[str]:
            return [self.block_digest(tokenizer, split) for split in SPLITS]

        def is_scored(record: CheckpointRecord) -> bool:
            return all(
                score_key(model_id=record.fingerprint, blocks=name, numerics=self.numerics) in known
                for name in blocks(record.tokenizer)
            )

        return frozenset(record.signature for record in checkpoints if is_scored(record))

    def by_domain(self, model_id: str, tokenizer: str, split: Split) -> dict[str, Estimate] | None:
        """The recorded loss of each domain, without its blocks; None when it was not scored."""
        record = self.records.get(ScoreRecord, self.key(model_id, tokenizer, split))
        if record is None:
            return None
        return {name: _estimate(score) for name, score in record.domains.items()}

    def target(self, model_id: str, tokenizer: str, split: Split) -> float | None:
        """The recorded target loss, nats per token; None when it was not scored."""
        by_domain = self.by_domain(model_id, tokenizer, split)
        return combine(by_domain, self.target_weights).mean if by_domain else None

    def losses(self, model_id: str, tokenizer: str, split: Split) -> Losses | None:
        """The recorded losses of a model on one split; None when it was not scored."""
        key = self.key(model_id, tokenizer, split)
        record = self.records.get(ScoreRecord, key)
        if record is None:
            return None
        arrays = self.records.arrays(ScoreRecord, key)
        return Losses(record.blocks, tuple(sorted(record.domains)), **arrays)


def _tokenizer_at(uri: str) -> TokenizerSource:
    found = tokenizer_files_digest(open_store(uri))
    if found is None:
        raise CorpusError(
            f"{uri}: no tokenizer files; set corpus.tokenizer in params.yaml to a folder that has "
            "them"
        )
    return TokenizerSource(found, uri)


def _reading() -> Reading:
    """The caps of this process, for a job to keep to while this process waits for it."""
    limits = throttle.limits()
    return Reading(
        megabytes_per_second=limits.megabytes_per_second,
        requests_per_second=limits.requests_per_second,
        own=tuple(str(folder) for folder in throttle.own()),
    )


def _estimate(score: DomainScore) -> Estimate:
    error = math.inf if score.standard_error is None else score.standard_error
    return Estimate(score.loss, error, score.documents)
