"""The scoring job as its parent runs it: a process that leaves records and says what it did."""

import json
import math
import shutil
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptfuse import blocks as blocks_module
from ckptfuse import job, jobs
from ckptfuse.blocks import Blocks
from ckptfuse.checkpoints import Checkpoint, open_checkpoint
from ckptfuse.errors import CkptfuseError
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.fusion import FusionSpec
from ckptfuse.jobs import ModelScores, run_job, run_jobs
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.modeling import build_model
from ckptfuse.perplexity import BlockLosses, score_blocks
from ckptfuse.protocol import (
    BlockSet,
    CheckpointModel,
    Event,
    Input,
    MergeModel,
    Model,
    Numerics,
    Progress,
    Request,
    Scored,
    score_key,
)
from ckptfuse.reading import Loaded, load
from ckptfuse.record_files import Records
from ckptfuse.records import ScoreRecord
from ckptfuse.store import FolderStore
from tests.helpers import blocks_of_lengths, lay_modules_of_a_team

NUMERICS = Numerics(dtype="float32", attention="sdpa", device_class="cpu")
BLOCKS = blocks_of_lengths([32] * 6 + [11], digest="blocks-1", documents=[0, 0, 1, 1, 2, 2, 3])
WEIGHTS = (0.25, 0.0, 0.75)
ROOT = Path(__file__).parents[2]
ANSWER = """print('{{"event": "losses", "blocks": "blocks-1", "nll": {nll}}}')"""


@dataclass(frozen=True)
class Ran:
    """One job over good and bad models, run once for all tests of this file."""

    request: Request
    answers: list[ModelScores]
    events: list[Event]
    spec: FusionSpec

    @property
    def records(self) -> Records:
        return Records(FolderStore(Path(self.request.records)))

    def nll(self, model_id: str) -> np.ndarray:
        key = score_key(model_id=model_id, blocks=BLOCKS.digest, numerics=NUMERICS)
        return self.records.arrays(ScoreRecord, key)["nll"]

    def record(self, model_id: str) -> ScoreRecord:
        key = score_key(model_id=model_id, blocks=BLOCKS.digest, numerics=NUMERICS)
        found = self.records.get(ScoreRecord, key)
        assert found is not None
        return found


def request_of(folder: Path, *models: Model) -> Request:
    if not (folder / "blocks").is_dir():
        blocks_module.save(BLOCKS, folder / "blocks")
    return Request(
        models=models,
        blocks=(BlockSet(folder=str(folder / "blocks"), digest=BLOCKS.digest, split="selection"),),
        numerics=NUMERICS,
        records=str(folder / "records"),
        batch_tokens=64,
        threads=1,
    )


def checkpoint(path: Path, **pinned: str) -> CheckpointModel:
    return CheckpointModel(input=Input(uri=str(path), **pinned))


def copied(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint; ``changes`` are to its configuration."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return target


def with_nan(source: Path, target: Path) -> Path:
    copied(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def ran(llamas: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("job")
    prints = tuple(fingerprint_of(open_checkpoint(str(path))) for path in llamas)
    spec = FusionSpec(prints, WEIGHTS, prints[-1])
    nan = with_nan(llamas[0], folder / "checkpoint-nan")
    inputs = tuple(Input(uri=str(path)) for path in llamas)
    merge = MergeModel(
        fusion=spec.id, inputs=inputs, weights=WEIGHTS, dtype=None, ancillary=inputs[-1]
    )
    poisoned = MergeModel(
        fusion="poisoned", inputs=(Input(uri=str(nan)), inputs[0]), weights=(0.5, 0.5), dtype=None,
        ancillary=inputs[0],
    )  # fmt: skip
    request = request_of(
        folder,
        checkpoint(nan),
        poisoned,
        checkpoint(copied(llamas[0], folder / "misfit", num_hidden_layers=3)),
        checkpoint(llamas[0], fingerprint="another"),
        checkpoint(copied(llamas[0], folder / "short", max_position_embeddings=16)),
        checkpoint(folder / "absent"),
        checkpoint(copied(llamas[0], folder / "odd", return_dict=False)),
        checkpoint(llamas[0]),
        merge,
        checkpoint(llamas[2], fingerprint=prints[2]),
    )
    events: list[Event] = []
    return Ran(request, run_job(request, progress=events.append), events, spec)


def test_a_checkpoints_losses_are_those_that_this_process_finds(
    ran: Ran, llamas: list[Path]
) -> None:
    loaded = load(open_checkpoint(str(llamas[0])))
    model = build_model(loaded.layout.config, loaded.state_dict, numerics=NUMERICS, where="here")
    expected = score_blocks(model, BLOCKS, vocabulary=96, batch_tokens=64).nll
    assert ran.nll(loaded.fingerprint) == pytest.approx(expected, rel=1e-6)
    assert ran.answers[7].fingerprint == loaded.fingerprint
    assert ran.answers[6].architecture == loaded.layout.architecture


def test_a_record_sums_its_losses_up(ran: Ran) -> None:
    print_ = ran.spec.fingerprints[0]
    score = ran.record(print_).domains["text"]
    assert score.loss == pytest.approx(ran.nll(print_).sum() / BLOCKS.predicted.sum())
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert (score.tokens, score.documents) == (6 * 31 + 10, 4)
    assert score.bits_per_byte == pytest.approx(
        ran.nll(print_).sum() / math.log(2) / BLOCKS.bytes.sum()
    )


def test_a_merge_is_scored_under_its_fusions_id_as_if_it_lay_on_disk(
    ran: Ran, llamas: list[Path]
) -> None:
    opened = [open_checkpoint(str(path)) for path in llamas]
    inputs = open_inputs(opened, opened[-1])
    model = build_model(
        inputs.ancillary.config, merge_to_memory(inputs, WEIGHTS), numerics=NUMERICS, where="here"
    )
    expected = score_blocks(model, BLOCKS, vocabulary=96, batch_tokens=64).nll
    assert ran.nll(ran.spec.id) == pytest.approx(expected, rel=1e-6)


def test_weights_that_are_not_finite_fail_their_model_and_name_it(ran: Ran) -> None:
    failed = ran.answers[0].failed
    assert failed is not None
    assert failed.error == "non-finite"
    assert "'model.norm.weight' has 1 NaN" in failed.reason


def test_of_a_merge_the_input_that_is_to_blame_is_named_by_its_uri(ran: Ran) -> None:
    failed = ran.answers[1].failed
    assert failed is not None
    assert failed.error == "non-finite"
    assert Path(failed.checkpoint or "").name == "checkpoint-nan"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "tomorrow5"}, "tomorrow5"),
        ({"max_position_embeddings": 16}, "to 16 or less"),
        ({"vocab_size": 50}, "outside of the model's vocabulary of 50"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "m.C"}}, "trust_remote_code"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 5.0}, "soft cap"),
    ],
)
def test_what_these_settings_can_never_score_is_refused_without_a_look_at_its_weights(
    tmp_path: Path, llamas: list[Path], changes: dict[str, object], said: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    never = copied(llamas[0], tmp_path / "never", **changes)
    monkeypatch.setattr(job, "load", lambda checkpoint: pytest.fail("its weights are read"))
    job.run(request_of(tmp_path, checkpoint(never)))
    (event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (event["event"], event["error"]) == ("failed", "other")
    assert said in event["reason"]


@pytest.mark.parametrize(
    ("index", "error", "said"),
    [
        (2, "damaged", "missing keys"),
        (3, "changed", "was pinned"),
        (4, "other", "to 16 or less"),
        (5, "other", "absent"),
        (6, "other", "odd: AttributeError"),  # transformers cannot run it; nor can we foresee it
    ],
)
def test_a_model_that_cannot_be_scored_says_why(
    ran: Ran, index: int, error: str, said: str
) -> None:
    failed = ran.answers[index].failed
    assert failed is not None
    assert failed.error == error
    assert said in failed.reason


def test_failures_do_not_stop_the_models_after_them(ran: Ran) -> None:
    assert [answer.scored is not None for answer in ran.answers] == [False] * 7 + [True] * 3
    assert len(ran.records.all(ScoreRecord)) == 3


def test_models_that_fail_take_time_as_others_do(ran: Ran) -> None:
    assert all(answer.seconds > 0 for answer in ran.answers)


def test_progress_is_told_for_each_model(ran: Ran) -> None:
    told = [(e.model, e.done, e.total) for e in ran.events if isinstance(e, Progress)]
    assert {(7, 7, 7), (8, 7, 7), (9, 7, 7)} <= set(told)


def test_what_has_its_records_is_not_scored_again(
    ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {entry.path: entry.version for entry in ran.records.store.list("")}
    job.run(ran.request.model_copy(update={"models": ran.request.models[7:]}))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["tokens"] for e in events if e["event"] == "scored"] == [0, 0, 0]
    assert {entry.path: entry.version for entry in ran.records.store.list("")} == before


def test_a_job_that_dies_fails_its_model_with_its_last_words(
    tmp_path: Path, llamas: list[Path]
) -> None:
    request = request_of(tmp_path, checkpoint(llamas[0]))
    (answer,) = run_job(request.model_copy(update={"records": "nowhere://records"}))
    assert answer.failed is not None
    assert answer.failed.reason.startswith("the scoring job ended with status 1: ")
    assert "unknown scheme" in answer.failed.reason


def test_a_job_that_is_killed_at_one_model_costs_no_other_its_answer(
    tmp_path: Path, llamas: list[Path]
) -> None:
    poison = shutil.copytree(llamas[2], tmp_path / "poison")
    engine = str(ROOT / "examples" / "own_engine.py")
    program = (
        "import os, runpy, sys\n"
        "if 'poison' in open(sys.argv[1]).read(): os.kill(os.getppid(), 9)\n"
        f"else: runpy.run_path({engine!r}, run_name='__main__')"
    )
    asked = request_of(
        tmp_path, checkpoint(llamas[0]), checkpoint(poison), checkpoint(llamas[1])
    ).model_copy(update={"command": (sys.executable, "-c", program)})
    told: list[Event] = []
    answers = run_job(asked, progress=told.append)
    assert [answer.scored is not None for answer in answers] == [True, False, True]
    assert answers[1].failed is not None
    assert answers[1].failed.reason.startswith("the scoring job ended with status -9 (out of mem")
    assert all(answer.seconds > 0 for answer in answers), "a job that died took its time too"
    ends = [(event.model, event.event) for event in told if event.event in ("scored", "failed")]
    assert sorted(ends) == [(0, "scored"), (1, "failed"), (2, "scored")]


@pytest.mark.parametrize("poison", [{0, 1}, {3, 4}, {0, 4}, {0, 1, 4}])
def test_models_that_kill_their_jobs_keep_no_other_from_being_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: set[int]
) -> None:
    def run_once(request: Request, *_: object) -> tuple[list[jobs.ModelScores], str]:
        answers = []
        for number, model in enumerate(request.models):
            if int(model.input.uri) in poison:  # type: ignore[union-attr]
                break
            scored = Scored(model=number, model_id="m", seconds=1.0, tokens=1)
            answers.append(jobs.ModelScores(scored=scored))
        return [*answers, *[jobs.ModelScores()] * (len(request.models) - len(answers))], "killed"

    monkeypatch.setattr(jobs, "_run_once", run_once)
    models = [CheckpointModel(input=Input(uri=str(number))) for number in range(5)]
    answers = run_job(request_of(tmp_path, *models))
    assert {n for n, answer in enumerate(answers) if answer.failed is not None} == poison


def test_a_fault_that_kills_every_job_is_not_tried_for_every_model(
    tmp_path: Path, llamas: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    run_once = jobs._run_once
    monkeypatch.setattr(jobs, "_run_once", lambda *a: started.append(a) or run_once(*a))
    request = request_of(tmp_path, *[checkpoint(llamas[0])] * 6)
    answers = run_job(request.model_copy(update={"records": "nowhere://records"}))
    told = [answer.failed.reason for answer in answers if answer.failed is not None]
    assert [reason.startswith("not tried") for reason in told] == [False, True, True, True, False,
                                                                   False]  # fmt: skip
    assert all("unknown scheme" in reason for reason in told)
    assert len(started) == 1 + jobs.ENOUGH


def test_infinite_losses_of_finite_weights_are_non_finite(
    tmp_path: Path, llamas: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    huge = copied(llamas[0], tmp_path / "huge")
    tensors = load_file(huge / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, huge / "model.safetensors", metadata={"format": "pt"})
    job.run(request_of(tmp_path, checkpoint(huge)))
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (failed,) = [event for event in said if event["event"] == "failed"]
    assert failed["error"] == "non-finite"
    assert "although every weight is finite" in failed["reason"]


def test_jobs_of_one_process_share_what_they_load_and_nothing_else(
    tmp_path: Path, llamas: list[Path]
) -> None:
    run_job(request_of(tmp_path, checkpoint(llamas[0])))
    (server,) = jobs._idle
    run_job(request_of(tmp_path, checkpoint(llamas[1])))
    assert jobs._idle == [server]
    children = Path(f"/proc/{server._process.pid}/task/{server._process.pid}/children")
    assert children.read_text() == ""


def test_a_job_takes_the_server_that_was_prepared_for_it(
    tmp_path: Path, llamas: list[Path]
) -> None:
    jobs.prepare()
    jobs.prepare()
    (server,) = jobs._idle
    run_job(request_of(tmp_path, checkpoint(llamas[0])))
    assert jobs._idle == [server]


def test_a_job_takes_this_processs_environment_and_folder_as_they_are_now(
    tmp_path: Path, llamas: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(request_of(tmp_path, checkpoint(llamas[0])))
    monkeypatch.chdir(llamas[1].parent)
    relative = checkpoint(Path(llamas[1].name))
    assert run_job(request_of(tmp_path, relative))[0].scored is not None
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    (answer,) = run_job(request_of(tmp_path, CheckpointModel(input=Input(uri="s3://away/x"))))
    assert answer.failed is not None
    assert "(nobody)" in answer.failed.reason


def test_a_job_takes_no_module_of_the_folder_that_it_runs_in(
    tmp_path: Path, llamas: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_modules_of_a_team(tmp_path)
    (tmp_path / "torch.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_idle", [])  # it starts there
    (answer,) = run_job(request_of(tmp_path, checkpoint(llamas[0])))
    for server in jobs._idle:
        server.kill()
    assert answer.scored is not None, answer


def test_a_job_that_is_broken_off_ends_and_the_next_one_runs(
    tmp_path: Path, llamas: list[Path]
) -> None:
    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run_job(request_of(tmp_path, checkpoint(llamas[0])), progress=stop)
    (answer,) = run_job(request_of(tmp_path, checkpoint(llamas[0])))
    assert answer.scored is not None


def talking(tensors: dict[str, torch.Tensor], _: object) -> dict[str, torch.Tensor]:
    print("converting... ", end="")
    return tensors


def test_what_a_teams_own_code_prints_swallows_no_event(tmp_path: Path, llamas: list[Path]) -> None:
    own = {"converter": f"{__name__}:talking", "model": str(llamas[0])}
    told: list[Event] = []
    asked = request_of(tmp_path, checkpoint(llamas[0])).model_copy(update=own)
    run_job(asked, progress=told.append)
    assert [event.event for event in told] == ["read", *["progress"] * 4, "scored"]


def test_a_fork_server_that_was_killed_between_jobs_is_replaced(
    tmp_path: Path, llamas: list[Path]
) -> None:
    run_job(request_of(tmp_path, checkpoint(llamas[0])))
    (server,) = jobs._idle
    server._process.kill()
    server._process.wait()
    (answer,) = run_job(request_of(tmp_path, checkpoint(llamas[1])))
    assert answer.scored is not None


def test_a_command_of_ones_own_stands_in_for_the_scorer(
    ran: Ran, tmp_path: Path, llamas: list[Path]
) -> None:
    command = (sys.executable, str(ROOT / "examples" / "own_engine.py"))
    inputs = tuple(Input(uri=str(path)) for path in llamas)
    merge = MergeModel(
        fusion=ran.spec.id, inputs=inputs, weights=WEIGHTS, dtype=None, ancillary=inputs[-1]
    )
    asked = request_of(tmp_path, checkpoint(llamas[0]), merge).model_copy(
        update={"command": command, "scratch": str(tmp_path)}
    )
    answers = run_job(asked)
    assert [answer.scored is not None for answer in answers] == [True, True]
    theirs = Ran(asked, answers, [], ran.spec)
    for model_id in (ran.spec.fingerprints[0], ran.spec.id):
        assert theirs.nll(model_id) == pytest.approx(ran.nll(model_id), rel=1e-6)
    assert not list(tmp_path.glob("merge-*"))


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit(3)", "-c 'raise SystemExit(3)') ended with status 3"),
        ("raise RuntimeError('driver too old')", "1: Traceback"),
        ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
        (ANSWER.format(nll="null"), "'losses' that is none, at nll: Input should be a valid array"),
        ("print('hello')", "0 losses, where one is expected for each of the 7 blocks"),
        ('print(\'{"event": "losses", "blocks": "blocks-1", "nll": [1.0]}\')', "with 1 losses"),
        ('print(\'{"event": "failed", "reason": "no licence"}\')', "no licence"),
        (ANSWER.format(nll="[1.0, NaN, 1, 1, 1, 1, 1]"), "with nan nats, which is no"),
        (ANSWER.format(nll="[1.0, 1, -0.5, 1, 1, 1, 1]"), "for block 2 of the selection"),
    ],
)
def test_a_command_that_does_not_answer_fails_the_model_with_what_it_did(
    tmp_path: Path, llamas: list[Path], program: str, said: str
) -> None:
    asked = request_of(tmp_path, checkpoint(llamas[0])).model_copy(
        update={"command": (sys.executable, "-c", program)}
    )
    (answer,) = run_job(asked)
    assert answer.failed is not None
    assert answer.failed.error == "other", "the checkpoint is not to blame"
    assert said in answer.failed.reason


def test_what_a_command_prints_beside_its_answer_is_ignored(
    tmp_path: Path, llamas: list[Path]
) -> None:
    lines = rb"""\xff\xfe a banner
{"event": "loading", "shard": 1}
{"event": "losses", "blocks": "blocks-1", "nll": [1, 1, 1, 1, 1, 1, 1], "seconds": 3.2}
[1]"""
    program = f"import sys; sys.stdout.buffer.write({lines!r})"
    asked = request_of(tmp_path, checkpoint(llamas[0])).model_copy(
        update={"command": (sys.executable, "-c", program)}
    )
    (answer,) = run_job(asked)
    assert answer.scored is not None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_weights_are_in_memory_while_a_command_scores(
    tmp_path: Path, llamas: list[Path], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Nor is the next checkpoint read, as it is ahead of our own scorer on a GPU."""
    held: list[weakref.ref[torch.Tensor]] = []

    def watched(checkpoint: Checkpoint, fingerprint: str | None) -> Loaded:
        loaded = load_input(checkpoint, fingerprint)
        held.extend(weakref.ref(tensor) for tensor in loaded.state_dict.values())
        return loaded

    def answer(*_: object) -> Iterator[tuple[BlockSet, Blocks, BlockLosses]]:
        assert held
        assert not any(tensor() is not None for tensor in held)
        yield asked.blocks[0], BLOCKS, BlockLosses(np.ones(len(BLOCKS)), 0)

    load_input = job._load
    monkeypatch.setattr(job, "_load", watched)
    monkeypatch.setattr(job, "by_command", answer)
    asked = request_of(tmp_path, *map(checkpoint, llamas[:2])).model_copy(
        update={
            "command": ("engine",),
            "numerics": NUMERICS.model_copy(update={"device_class": device}),
        }
    )
    job.run(asked)
    assert len(Records(FolderStore(tmp_path / "records")).all(ScoreRecord)) == 2


def test_a_request_is_shared_out_over_slots_and_answered_in_its_order(
    ran: Ran, tmp_path: Path, llamas: list[Path]
) -> None:
    """Two real jobs at once, each with its own environment, as two GPUs would have them."""
    program = (
        "import os, json; print(json.dumps({'event': 'losses', 'blocks': 'blocks-1',"
        " 'nll': [float(os.environ['SLOT'])] * 7}))"
    )
    asked = request_of(tmp_path, *map(checkpoint, llamas)).model_copy(
        update={"command": (sys.executable, "-c", program)}
    )
    told: list[Event] = []
    answers = run_jobs(asked, [{"SLOT": "1"}, {"SLOT": "2"}], progress=told.append)
    assert [answer.fingerprint for answer in answers] == list(ran.spec.fingerprints)
    assert {event.model for event in told} == {0, 1, 2}
    found = Ran(asked, answers, [], ran.spec)
    assert [found.nll(print_)[0] for print_ in ran.spec.fingerprints] == [1, 2, 1]


def test_a_checkpoint_is_read_while_the_one_before_it_is_scored(
    llamas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def noting(checkpoint: Checkpoint, fingerprint: str | None) -> Loaded:
        read.append(checkpoint.name)
        return load_input(checkpoint, fingerprint)

    load_input = job._load
    monkeypatch.setattr(job, "_load", noting)
    models = (*map(checkpoint, llamas), checkpoint(tmp_path / "absent"))
    request = request_of(tmp_path, *models)
    ahead = job._Checkpoints(request, ahead=True)
    names = [path.name for path in llamas]
    for index, name in enumerate(names):
        assert ahead.take(index).layout.checkpoint.name == name
        ahead._reader.submit(lambda: None).result()
        assert read == names[: index + 2]
    with pytest.raises(CkptfuseError, match="absent"):
        ahead.take(len(llamas))

    read.clear()
    alone = job._Checkpoints(request, ahead=False)
    alone.take(0)
    alone._reader.submit(lambda: None).result()
    assert read == names[:1]
