"""The parent's side of scoring: what is remembered, what is asked for, what travels as a file."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ckptfuse.blocks import load
from ckptfuse.corpus import SPLITS
from ckptfuse.errors import CorpusError, RecordError
from ckptfuse.jobs import ModelScores
from ckptfuse.params import ScoringParams
from ckptfuse.protocol import (
    BlockSet,
    CheckpointModel,
    Failed,
    Input,
    Numerics,
    Scored,
    score_key,
)
from ckptfuse.records import ScoreRecord
from ckptfuse.score_files import export_scores, import_scores
from ckptfuse.scoring import Scorer, TokenizerSource, numerics
from ckptfuse.service import Service
from tests.helpers import make_service, record_losses
from tests.unit.test_blocks import write_tokenizer


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return make_service(tmp_path, scoring={"block_length": 8, "device": "cpu"})


@pytest.fixture
def tokenizer(service: Service, tmp_path: Path) -> TokenizerSource:
    return service.scorer.tokenizer(str(write_tokenizer(tmp_path / "tokenizer", bos_token="<s>")))


# -- numerics ----------------------------------------------------------------------------------


def test_a_cpu_scores_in_float32_and_a_gpu_in_bfloat16_unless_asked() -> None:
    def chosen(**values: str) -> str:
        return numerics(ScoringParams.model_validate(values)).dtype

    assert chosen(device="cpu") == "float32"
    assert chosen(device="cuda") == "bfloat16"
    assert chosen(device="cpu", dtype="bfloat16") == "bfloat16"


def test_a_machine_told_to_show_no_gpu_scores_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert numerics(ScoringParams()).device_class == "cpu"


def test_losses_of_other_models_blocks_or_numerics_have_other_keys() -> None:
    usual = Numerics(dtype="float32", attention="sdpa", device_class="cpu")
    others = [{"dtype": "bfloat16"}, {"attention": "eager"}, {"device_class": "cuda"},
              {"protocol": 99}]  # fmt: skip
    keys = [score_key(model_id="m", blocks="b", numerics=usual.model_copy(update=change))
            for change in [{}, *others]]  # fmt: skip
    keys += [
        score_key(model_id="n", blocks="b", numerics=usual),
        score_key(model_id="m", blocks="c", numerics=usual),
    ]
    assert len(set(keys)) == 7


# -- corpus and blocks on disk -----------------------------------------------------------------


def test_the_corpus_digest_follows_the_texts_content_and_not_its_file(
    service: Service, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    before = service.scorer.corpus_digest()
    content = text.read_text()
    text.write_text(content)  # touched
    assert make_service(tmp_path).scorer.corpus_digest() == before
    with text.open("a") as out:
        out.write('\n{"text": "one more"}')
    renewed = Service(service.params, service.workspace)
    assert renewed.scorer.corpus_digest() != before


def test_blocks_are_made_once_and_found_by_their_digest(
    service: Service, tokenizer: TokenizerSource
) -> None:
    first = service.scorer.block_set(tokenizer, "audit")
    made = {path.name: path.stat().st_mtime_ns for path in Path(first.folder).iterdir()}
    assert service.scorer.block_set(tokenizer, "audit") == first
    assert {path.name: path.stat().st_mtime_ns for path in Path(first.folder).iterdir()} == made
    assert load(first.folder).digest == first.digest


def test_two_processes_that_make_the_same_blocks_at_once_end_with_one_set(
    service: Service, tokenizer: TokenizerSource
) -> None:
    start = threading.Barrier(2)

    def make(one: Service) -> BlockSet:
        start.wait()
        return one.scorer.block_set(tokenizer, "audit")

    both = [Service(service.params, service.workspace) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(make, both)
    assert first == second
    (folder,) = Path(first.folder).parent.iterdir()
    assert folder == Path(first.folder)
    assert isinstance(load(folder).tokens, np.memmap)


def test_a_domains_own_budget_cuts_its_blocks(
    service: Service, tokenizer: TokenizerSource, tmp_path: Path
) -> None:
    path = str(tmp_path / "text.jsonl")
    text = {"domains": {"text": {"path": path, "tokens": {"audit": 9}}}}
    small = make_service(tmp_path, corpus=text, scoring={"block_length": 8})
    usual = load(service.scorer.block_set(tokenizer, "audit").folder).tokens
    cut = load(small.scorer.block_set(tokenizer, "audit").folder).tokens
    assert cut.tolist() == usual[:9].tolist()
    other = [load(s.scorer.block_set(tokenizer, "report").folder) for s in (service, small)]
    assert other[0].tokens.tolist() == other[1].tokens.tolist()


def test_no_text_is_in_the_blocks_of_two_splits(
    service: Service, tokenizer: TokenizerSource
) -> None:
    streams = [
        set(_documents(load(service.scorer.block_set(tokenizer, s).folder).tokens.tolist()))
        for s in SPLITS
    ]
    assert all(streams)
    assert len(set.union(*streams)) == sum(len(stream) for stream in streams) == 30


def _documents(tokens: list[int]) -> list[tuple[int, ...]]:
    """The stream, cut at its separators (the first token)."""
    text = " ".join(map(str, tokens))
    return [tuple(map(int, part.split())) for part in text.split(f"{tokens[0]} ") if part.strip()]


def test_a_tokenizer_of_ones_own_stands_over_the_checkpoints(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path / "own", bos_token="<s>")
    write_tokenizer(tmp_path / "checkpoint", bos_token="<x>")
    text = {"domains": {"text": {"path": str(tmp_path / "text.jsonl")}}, "tokenizer": str(own)}
    service = make_service(tmp_path, corpus=text)
    found = service.scorer.tokenizer(str(tmp_path / "checkpoint"))
    assert found.uri == str(own)
    plain = make_service(tmp_path).scorer.tokenizer(str(tmp_path / "checkpoint"))
    assert plain.digest != found.digest


def test_a_checkpoint_without_a_tokenizer_says_what_to_set(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(CorpusError, match=r"corpus\.tokenizer"):
        service.scorer.tokenizer(str(tmp_path / "bare"))


# -- what scoring costs ------------------------------------------------------------------------


class Answers:
    """A runner with these answers, whatever it is asked."""

    def __init__(self, *answers: ModelScores) -> None:
        self._answers = list(answers)

    def prepare(self) -> None:
        pass

    def run(self, *_: object, **__: object) -> list[ModelScores]:
        return self._answers


def scored_by(service: Service, tokenizer: TokenizerSource, *answers: ModelScores) -> Scorer:
    service.scorer.runner = Answers(*answers)
    models = [CheckpointModel(input=Input(uri="/x"))] * len(answers)
    assert service.scorer.score(models, tokenizer) == list(answers)
    return service.scorer


def test_models_that_fail_use_up_the_budget(service: Service, tokenizer: TokenizerSource) -> None:
    good = ModelScores(scored=Scored(model=0, model_id="x", seconds=1.0, tokens=1), seconds=1800.0)
    failed = ModelScores(failed=Failed(model=1, error="other", reason="no memory"), seconds=1800.0)
    scorer = scored_by(service, tokenizer, good, failed)
    assert scorer.meter.total() == 1.0
    assert scorer.meter.affordable(3.0, time.time() + 1) == 4, "what failed is no measure of others"


# -- scores as files ---------------------------------------------------------------------------


def test_scores_travel_to_another_workspace_as_they_were(service: Service, tmp_path: Path) -> None:
    record_losses(service, "model", np.linspace(9, 11, 7))
    export_scores(service.scorer, "model", "tokenizer", tmp_path / "out" / "model.npz")
    other = make_service(tmp_path, workspace=str(tmp_path / "other"),
                         scoring={"block_length": 8, "device": "cpu"})  # fmt: skip
    import_scores(other.records, tmp_path / "out" / "model.npz")
    assert other.scorer.is_scored("model", "tokenizer")
    assert other.records.all(ScoreRecord) == service.records.all(ScoreRecord)
    for split in SPLITS:
        mine = service.scorer.losses("model", "tokenizer", split)
        theirs = other.scorer.losses("model", "tokenizer", split)
        assert mine is not None
        assert theirs is not None
        assert theirs.nll.tobytes() == mine.nll.tobytes()


def test_a_model_without_all_its_scores_is_not_exported(service: Service, tmp_path: Path) -> None:
    record_losses(service, "model", np.ones(3), ["selection"])
    with pytest.raises(RecordError, match="no score on the audit split"):
        export_scores(service.scorer, "model", "tokenizer", tmp_path / "model.npz")
    assert not (tmp_path / "model.npz").exists()


def test_an_export_replaces_a_read_only_link_of_dvcs(service: Service, tmp_path: Path) -> None:
    record_losses(service, "model", np.ones(3))
    cached = tmp_path / "cached"
    cached.write_bytes(b"in the cache")
    (tmp_path / "model.npz").hardlink_to(cached)
    cached.chmod(0o444)
    export_scores(service.scorer, "model", "tokenizer", tmp_path / "model.npz")
    assert cached.read_bytes() == b"in the cache"
    assert (tmp_path / "model.npz").stat().st_size > 100
