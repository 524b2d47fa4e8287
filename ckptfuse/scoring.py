"""The parent's side of scoring: numerics of this machine, blocks on disk, jobs as processes."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ckptfuse import blocks as blocks_module
from ckptfuse import conversion
from ckptfuse.blocks import block_digest, load_tokenizer, tokenizer_files_digest
from ckptfuse.corpus import SPLITS, Corpus, Split, documents_of, read_corpus
from ckptfuse.digests import digest
from ckptfuse.errors import CorpusError, JobError, MissingFile
from ckptfuse.losses import Estimate, Losses
from ckptfuse.params import Params, ScoringParams
from ckptfuse.processes import end_with_parent
from ckptfuse.protocol import (
    BlockSet,
    Event,
    Failed,
    Model,
    Numerics,
    Read,
    Reading,
    Request,
    Scored,
    score_key,
)
from ckptfuse.records import DomainScore, Records, ScoreRecord
from ckptfuse.store import open_store, split_uri, throttle

_EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


def numerics(params: ScoringParams) -> Numerics:
    """What ``auto`` means on this machine: bfloat16 on a GPU, float32 on a CPU."""
    device = params.device if params.device != "auto" else _device()
    dtype = params.dtype if params.dtype != "auto" else _default_dtype(device)
    return Numerics.model_validate(
        {
            "dtype": dtype,
            "attention": params.attention,
            "device_class": device,
            "converter": conversion.identity(params.converter, params.model),
        }
    )


def _device() -> str:
    """cuda where a GPU is visible: asked of the driver's device files, since torch loads slowly."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "cpu"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def _default_dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


@dataclass(frozen=True)
class ModelScores:
    """What a job said of one model of its request."""

    fingerprint: str | None = None
    architecture: str | None = None
    scored: Scored | None = None
    failed: Failed | None = None


def run_job(
    request: Request, *, progress: Callable[[Event], None] = lambda event: None
) -> list[ModelScores]:
    """Run one scoring job to its end; one answer per model of the request.

    Raises JobError when the process dies or stops before it has spoken of every model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "request.json")
        path.write_text(request.model_dump_json())
        errors = Path(folder, "stderr")
        with (
            errors.open("wb") as error_file,
            subprocess.Popen(
                [sys.executable, "-m", "ckptfuse.job", str(path)],
                stdout=subprocess.PIPE,
                stderr=error_file,
                text=True,
                preexec_fn=end_with_parent,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                events = _listen(process.stdout, progress)
            except BaseException:
                process.kill()
                raise
        answers = [_answer(index, events) for index in range(len(request.models))]
        if process.returncode != 0 or not all(a.scored or a.failed for a in answers):
            tail = errors.read_text(errors="replace")[-2000:]
            raise JobError(f"the scoring job ended with status {process.returncode}:\n{tail}")
    return answers


def _listen(lines: object, progress: Callable[[Event], None]) -> list[Event]:
    events = []
    for line in lines:  # type: ignore[attr-defined]
        try:
            event = _EVENTS.validate_json(line)
        except ValidationError:  # a library's print, not ours
            continue
        progress(event)
        events.append(event)
    return events


def _answer(index: int, events: Sequence[Event]) -> ModelScores:
    mine = [event for event in events if event.model == index]
    read = next((event for event in mine if isinstance(event, Read)), None)
    return ModelScores(
        fingerprint=read.fingerprint if read else None,
        architecture=read.architecture if read else None,
        scored=next((event for event in mine if isinstance(event, Scored)), None),
        failed=next((event for event in mine if isinstance(event, Failed)), None),
    )


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """A tokenizer by the digest of its files, and a place where they lie."""

    digest: str
    uri: str


class Scorer:
    """Scores models on a corpus's splits, with everything that is known kept on disk.

    ``folder`` holds blocks and remembered digests, both of which can be made again at any time.
    """

    def __init__(self, params: Params, records: Records, folder: Path) -> None:
        self.params = params
        self.records = records
        self.folder = folder
        self.numerics = numerics(params.scoring)
        self._corpus: Corpus | None = None

    @property
    def target_weights(self) -> dict[str, float]:
        return {name: domain.weight for name, domain in self.params.corpus.domains.items()}

    def tokenizer(self, checkpoint_uri: str) -> TokenizerSource:
        """The tokenizer that scores this checkpoint; raises CorpusError without one."""
        uri = self.params.corpus.tokenizer or self.params.scoring.model or checkpoint_uri
        found = tokenizer_files_digest(open_store(uri))
        if found is None:
            raise CorpusError(
                f"{uri}: no tokenizer files; set corpus.tokenizer in params.yaml to a folder "
                "that has them"
            )
        return TokenizerSource(found, uri)

    def corpus(self) -> Corpus:
        if self._corpus is None:
            self._corpus = read_corpus(self.params.corpus)
        return self._corpus

    def corpus_digest(self) -> str:
        """The corpus's digest, remembered by size and version of its files."""
        files = {}
        for name, domain in self.params.corpus.domains.items():
            parent, file = split_uri(domain.path)
            try:
                entry = open_store(parent).stat(file)
            except MissingFile as error:
                raise CorpusError(f"corpus.domains.{name}: {error}") from error
            files[name] = [domain.path, entry.size, entry.version]
        decides = self.params.corpus.model_dump(mode="json", exclude={"domains"})
        memory = self.folder / "corpora" / f"{digest([files, decides])}.json"
        if memory.is_file():
            return str(json.loads(memory.read_text()))
        found = self.corpus().digest
        open_store(memory.parent).write(memory.name, json.dumps(found).encode())
        return found

    def block_digest(self, tokenizer: str, split: Split) -> str:
        return block_digest(
            corpus=self.corpus_digest(),
            tokenizer=tokenizer,
            split=split,
            block_length=self.params.scoring.block_length,
            bos=self.params.scoring.bos,
        )

    def block_set(self, tokenizer: TokenizerSource, split: Split) -> BlockSet:
        """The split's blocks on disk, tokenised now if they are not there."""
        name = self.block_digest(tokenizer.digest, split)
        folder = self.folder / "blocks" / name
        if not (folder / "blocks.json").is_file():
            built = blocks_module.build(
                documents_of(self.corpus(), split, self.params.corpus),
                load_tokenizer(open_store(tokenizer.uri)),
                digest=name,
                block_length=self.params.scoring.block_length,
                bos=self.params.scoring.bos,
                tokens=getattr(self.params.corpus.tokens, split),
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
        """Score models in one job, on the given splits."""
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
        )
        return run_job(request, progress=progress)

    def key(self, model_id: str, tokenizer: str, split: Split) -> str:
        blocks = self.block_digest(tokenizer, split)
        return score_key(model_id=model_id, blocks=blocks, numerics=self.numerics)

    def is_scored(self, model_id: str, tokenizer: str) -> bool:
        """Whether every split of this model has its record."""
        keys = (self.key(model_id, tokenizer, split) for split in SPLITS)
        return all(self.records.has(ScoreRecord, key) for key in keys)

    def by_domain(self, model_id: str, tokenizer: str, split: Split) -> dict[str, Estimate] | None:
        """The recorded loss of each domain, without its blocks; None when it was not scored."""
        record = self.records.get(ScoreRecord, self.key(model_id, tokenizer, split))
        if record is None:
            return None
        return {name: _estimate(score) for name, score in record.domains.items()}

    def losses(self, model_id: str, tokenizer: str, split: Split) -> Losses | None:
        """The recorded losses of a model on one split; None when it was not scored."""
        key = self.key(model_id, tokenizer, split)
        record = self.records.get(ScoreRecord, key)
        if record is None:
            return None
        arrays = self.records.arrays(ScoreRecord, key)
        return Losses(record.blocks, tuple(sorted(record.domains)), **arrays)


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
