"""Steps from records to records: each asks first what is there, and repairs what a kill left."""

import math
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import ChangedCheckpoint, CkptfuseError, RecordError
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.gate import best_member
from ckptfuse.jobs import ModelScores
from ckptfuse.merge.passes import Pass
from ckptfuse.params import Params
from ckptfuse.plan import Fuse, Quarantine, Skip
from ckptfuse.reading import load
from ckptfuse.records import FusionRecord, GateRecord, PlanRecord, SkipRecord
from ckptfuse.rules import Observation, get_rule
from ckptfuse.service import Service, losses_of, open_service, plans_of
from ckptfuse.steps.judge import judge_fusion
from ckptfuse.steps.look import discover, load_state, next_actions, quarantine, skip
from ckptfuse.steps.merge import merge_fusion, merge_shard
from ckptfuse.steps.score import Unscored
from ckptfuse.steps.score import _remember as remember
from ckptfuse.steps.weigh import decide_weights, review_weights, spec_of
from ckptfuse.window import Window
from tests.helpers import (
    checkpoint_record,
    folder_bytes,
    make_older,
    make_service,
    member,
    plan_record,
    record_losses,
    write_checkpoint,
)

WEIGHTS = (0.25, 0.0, 0.75)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A bucket of three checkpoints whose only tensor is their number."""
    bucket = tmp_path / "bucket"
    for n in (1, 2, 3):
        write_checkpoint(bucket / f"step{n}00", {"w": torch.full((4,), float(n))})
    return make_service(tmp_path, bucket=str(bucket), rule={"name": "uniform"})


def decided(service: Service, weights: Sequence[float] = WEIGHTS) -> PlanRecord:
    """A plan of the bucket's checkpoints with these weights."""
    members = []
    for n, weight in enumerate(weights, start=1):
        found = open_checkpoint(f"{service.params.bucket}/step{n}00")
        members.append(
            member(n * 100, 2.0, weight).model_copy(
                update={"uri": found.uri, "signature": found.signature,
                        "fingerprint": fingerprint_of(found)}
            )
        )  # fmt: skip
    return plan_record(300, members, fusion=spec_of(service, members, weights).id)


def merged_weight(service: Service, plan: PlanRecord) -> float:
    folder = str(service.workspace.model(plan.fusion))
    return float(load(open_checkpoint(folder)).state_dict["w"][0])


# -- merge -------------------------------------------------------------------------------------


def test_a_merge_leaves_a_folder_and_a_record_of_its_files(service: Service) -> None:
    plan = decided(service)
    assert service.weights_of(plan.fusion) is None
    record = merge_fusion(service, plan)
    folder = service.workspace.model(plan.fusion)
    assert service.weights_of(plan.fusion) == folder
    assert merged_weight(service, plan) == 0.25 * 1 + 0.75 * 3
    assert record.files.keys() == {path.name for path in folder.iterdir()}
    assert record.size == sum(path.stat().st_size for path in folder.iterdir())
    assert service.records.get(FusionRecord, plan.fusion) == record


def test_what_is_merged_is_not_merged_again(service: Service) -> None:
    first = merge_fusion(service, decided(service))
    plan = decided(service)
    shutil.rmtree(service.params.bucket or "")
    assert merge_fusion(service, plan) == first


def test_a_member_without_weight_may_be_gone(service: Service) -> None:
    """Trainers delete their oldest checkpoints while we work."""
    plan = decided(service)
    shutil.rmtree(f"{service.params.bucket}/step200")
    merge_fusion(service, plan)
    assert merged_weight(service, plan) == 2.5


def test_the_newest_lends_its_tokenizer_even_without_weight(service: Service) -> None:
    (Path(service.params.bucket or "") / "step300" / "tokenizer.json").write_text("{}")
    plan = decided(service, (0.5, 0.5, 0.0))
    assert "tokenizer.json" in merge_fusion(service, plan).files
    assert merged_weight(service, plan) == 1.5


def test_a_folder_without_a_record_is_of_a_killed_run_and_made_anew(service: Service) -> None:
    plan = decided(service)
    folder = service.workspace.model(plan.fusion)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    merge_fusion(service, plan)
    assert merged_weight(service, plan) == 2.5


def test_pruned_weights_are_made_again_byte_for_byte(service: Service) -> None:
    plan = decided(service)
    merge_fusion(service, plan)
    before = folder_bytes(service.workspace.model(plan.fusion))
    shutil.rmtree(service.workspace.model(plan.fusion))
    merge_fusion(service, plan)
    assert folder_bytes(service.workspace.model(plan.fusion)) == before


def test_a_workspace_that_moved_has_its_merges_all_the_same(
    service: Service, tmp_path: Path
) -> None:
    plan = decided(service)
    first = merge_fusion(service, plan)
    shutil.rmtree(service.params.bucket or "")
    service.workspace.root.rename(tmp_path / "moved")
    moved = make_service(tmp_path, workspace=str(tmp_path / "moved"))
    assert merge_fusion(moved, plan) == first


def sharded(folder: Path, shards: int) -> tuple[Service, PlanRecord]:
    """A service that merges in so many shards, and a plan of checkpoints of two weight files."""
    for n in (1, 2, 3):
        tensors = {"w": torch.full((4,), float(n)), "x": torch.arange(3.0) * n}
        write_checkpoint(folder / "bucket" / f"step{n}00", tensors, shards=2)
    bucket = str(folder / "bucket")
    made = make_service(folder, bucket=bucket, rule={"name": "uniform"}, fuse={"shards": shards})
    return made, decided(made)


def test_shards_before_it_change_nothing_of_a_merge(tmp_path: Path) -> None:
    """Done, left undone by a kill, or more than there are files."""
    whole, plan = sharded(tmp_path / "whole", 1)
    expected = merge_fusion(whole, plan)
    for done in ([], [1], [0, 1, 2]):
        service, same_plan = sharded(tmp_path / f"{len(done)}", 3)
        for shard in done:
            merge_shard(service, same_plan, shard)
            assert not service.workspace.model(plan.fusion).exists()
        made = merge_fusion(service, same_plan)
        assert (made.fusion, made.files) == (expected.fusion, expected.files)
        folders = [one.workspace.model(plan.fusion) for one in (service, whole)]
        assert folder_bytes(folders[0]) == folder_bytes(folders[1])
        assert [path.name for path in folders[0].parent.iterdir()] == [made.fusion]


def test_the_last_step_merges_only_what_the_shards_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, plan = sharded(tmp_path, 2)
    merge_shard(service, plan, 1)
    merge_file, files = Pass.merge_file, []
    monkeypatch.setattr(
        Pass, "merge_file", lambda *given: files.append(given[1].name) or merge_file(*given)
    )
    merge_fusion(service, plan)
    assert files == ["model-00001-of-00002.safetensors"]


def test_a_shard_is_merged_by_a_worker_that_got_the_task_as_bytes(tmp_path: Path) -> None:
    service, plan = sharded(tmp_path, 2)
    service.scorer.corpus_digest()
    there: Service = pickle.loads(pickle.dumps(service))
    merge_shard(there, plan, 0)
    (unfinished,) = service.workspace.model(plan.fusion).parent.iterdir()
    assert (unfinished / "model-00001-of-00002.safetensors").exists()


def test_a_member_that_was_written_again_is_not_merged_under_its_old_name(
    service: Service,
) -> None:
    plan = decided(service)
    make_older(Path(f"{service.params.bucket}/step100"), 50)
    with pytest.raises(ChangedCheckpoint):
        merge_fusion(service, plan)
    assert not service.workspace.model(plan.fusion).exists()


# -- look --------------------------------------------------------------------------------------


def test_a_first_look_finds_the_checkpoints_and_wants_them_scored(service: Service) -> None:
    listing, state = discover(service)
    actions = next_actions(service, listing, state, live=True)
    assert [checkpoint.step for checkpoint in actions.score] == [100, 200, 300]
    held = frozenset({listing.complete[0].signature})
    rest = next_actions(service, listing, load_state(service, held), live=True)
    assert [checkpoint.step for checkpoint in rest.score] == [200, 300]


def test_quarantine_and_skip_are_records_that_the_next_look_heeds(service: Service) -> None:
    listing, _ = discover(service)
    quarantine(service, Quarantine(listing.complete[2], None, "NaN"))
    skip(service, Skip("window", 300, "superseded"))
    state = load_state(service)
    assert state.quarantined[listing.complete[2].signature].reason == "NaN"
    assert state.is_closed("window")
    actions = next_actions(service, listing, state, live=True)
    assert [checkpoint.step for checkpoint in actions.score] == [100, 200]


def test_a_checkpoint_counts_as_scored_when_every_split_has_its_record(service: Service) -> None:
    record = checkpoint_record(100, tokenizer="tokenizer")
    service.records.put(record.signature, record)
    record_losses(service, record.fingerprint, np.ones(4), ["selection", "audit"])
    assert load_state(service).scored == frozenset()
    record_losses(service, record.fingerprint, np.ones(4), ["report"])
    assert load_state(service).scored == {record.signature}


def scored_with(service: Service, tokenizer: str | None) -> Service:
    """The same trajectory under parameters that name this tokenizer, or none."""
    corpus = service.params.corpus.model_copy(update={"tokenizer": tokenizer})
    return open_service(service.params.model_copy(update={"corpus": corpus}))


def land_scores(service: Service) -> list[Unscored]:
    """As if jobs had scored what is to be scored, with the tokenizer that they are told."""
    listing, state = discover(service)
    actions = next_actions(service, listing, state, live=True)
    unscored = []
    for found in actions.score:
        checkpoint = open_checkpoint(found.uri)
        source = service.scorer.tokenizer(checkpoint.uri)
        answer = ModelScores(fingerprint=fingerprint_of(checkpoint), architecture="a")
        record_losses(service, str(answer.fingerprint), np.ones(40), tokenizer=source.digest)
        try:
            remember(service, found, source, answer)
        except CkptfuseError as error:
            unscored.append(Unscored(found, str(error), quarantined=False))
    return unscored


def test_what_scores_a_checkpoint_follows_the_parameters(service: Service, tmp_path: Path) -> None:
    """To a tokenizer that they name, to another, to the checkpoints' own, and back."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(f'"{name}"')
    for folder in Path(service.params.bucket or "").iterdir():
        (folder / "tokenizer.json").write_text('"own"')
        make_older(folder, 60)
    digests = set()
    for named in (str(tmp_path / "one"), str(tmp_path / "two"), None):
        now = scored_with(service, named)
        assert load_state(now).scored == frozenset()
        assert land_scores(now) == []
        assert len(load_state(now).scored) == 3
        digests |= {record.tokenizer for record in now.checkpoints().values()}
        listing, state = discover(now)
        (item,) = next_actions(now, listing, state, live=True).fuse
        assert decide_weights(now, item).tokenizer == item.window.newest.tokenizer
    assert len(digests) == 3
    assert len(load_state(scored_with(service, str(tmp_path / "one"))).scored) == 3


def test_a_record_that_does_not_know_the_checkpoints_own_tokenizer_says_what_to_do(
    service: Service,
) -> None:
    for folder in Path(service.params.bucket or "").iterdir():
        (folder / "tokenizer.json").write_text('"own"')
        make_older(folder, 60)
    listing, _ = discover(service)
    for found in listing.complete:
        record = checkpoint_record(found.step, signature=found.signature, tokenizer="named")
        service.records.put(found.signature, record)
    assert all("name that one again" in item.reason for item in land_scores(service))
    assert load_state(service).scored == frozenset()


# -- weigh -------------------------------------------------------------------------------------


def window_of(service: Service, losses: Sequence[float]) -> Fuse:
    """A window of scored checkpoints; the newest is the bucket's, which has a tokenizer."""
    newest = Path(service.params.bucket or "") / "step300"
    (newest / "tokenizer.json").write_text("{}")
    uris = ["/gone/step100", "/gone/step200", str(newest)]
    members = []
    for n, (uri, loss) in enumerate(zip(uris, losses, strict=True), start=1):
        print_ = f"f{n}"
        members.append(
            checkpoint_record(n * 100, uri=uri, tokenizer="tokenizer", fingerprint=print_)
        )
        record_losses(service, print_, np.linspace(9, 11, 40) * loss)
    return Fuse("window", Window(tuple(members)))


def test_a_plan_names_members_weights_losses_and_the_fusion(service: Service) -> None:
    plan = decide_weights(service, window_of(service, [2.0, 1.9, 2.1]))
    assert [m.weight for m in plan.members] == pytest.approx([1 / 3] * 3)
    assert [m.loss for m in plan.members] == pytest.approx([2.0, 1.9, 2.1])
    assert plan.fusion == spec_of(service, plan.members, [m.weight for m in plan.members]).id
    assert plan.ancillary == "f3"


def test_a_plan_stands_even_if_the_rule_would_answer_otherwise_now(service: Service) -> None:
    item = window_of(service, [2.0, 1.9, 2.1])
    first = decide_weights(service, item)
    params = service.params.model_copy(
        update={"rule": service.params.rule.model_copy(update={"name": "latest"})}
    )
    assert decide_weights(open_service(params), item) == first


def test_a_plan_is_made_again_without_a_checkpoint_that_vanished(service: Service) -> None:
    item = window_of(service, [2.0, 1.9, 2.1])
    first = decide_weights(service, item)
    left = Fuse(item.key, Window(item.window.members[1:]))
    second = decide_weights(service, left)
    assert [m.fingerprint for m in second.members] == ["f2", "f3"]
    assert second.window == first.window
    assert decide_weights(service, left) == second


def test_a_plan_that_is_merged_needs_its_checkpoints_no_more(
    service: Service, tmp_path: Path
) -> None:
    item = window_of(service, [2.0, 1.9, 2.1])
    first = decide_weights(service, item)
    merged = FusionRecord(fusion=first.fusion, step=300, size=0, files={})
    service.records.put(first.fusion, merged)
    service.workspace.model(first.fusion).mkdir()
    assert decide_weights(service, Fuse(item.key, Window(item.window.members[1:]))) == first


@pytest.mark.parametrize(("code", "prose", "step"), [(1.0, 0.1, 100), (0.1, 1.0, 300)])
def test_weights_of_domains_decide_what_is_best_for_rule_and_gate_alike(
    tmp_path: Path, code: float, prose: float, step: int
) -> None:
    """Step 100 is better at code, step 300 at prose."""
    (tmp_path / "prose.jsonl").write_text('{"text": "of its own"}')
    domains = {"code": {"path": str(tmp_path / "text.jsonl"), "weight": code},
               "prose": {"path": str(tmp_path / "prose.jsonl"), "weight": prose}}  # fmt: skip
    service = make_service(tmp_path, corpus={"domains": domains}, rule={"name": "best"})
    write_checkpoint(tmp_path / "step300", {"w": torch.ones(4)})
    (tmp_path / "step300" / "tokenizer.json").write_text("{}")
    members = []
    for number, losses in ((100, (2.0, 3.0)), (300, (2.2, 2.8))):
        uri = str(tmp_path / "step300")
        record = checkpoint_record(number, uri=uri, tokenizer="tokenizer")
        record_losses(
            service, record.fingerprint, np.repeat(losses, 10) * 10, domains=list(domains)
        )
        members.append(record)
    plan = decide_weights(service, Fuse("window", Window(tuple(members))))
    assert [m.step for m in plan.members if m.weight] == [step]
    assert best_member(plan.members).step == step


# -- review ------------------------------------------------------------------------------------


def record_merge(service: Service, item: Fuse, weights: Sequence[float], loss: float) -> None:
    """Leave the records of a scoring job that made and scored this merge."""
    source = service.scorer.tokenizer(item.window.newest.uri)
    fusion = spec_of(service, item.window.members, weights).id
    record_losses(service, fusion, np.linspace(9, 11, 40) * loss, tokenizer=source.digest)


def weighing_by(service: Service, rule: str, **options: object) -> Service:
    chosen = {"name": rule, "options": options}
    return open_service(Params.model_validate({**service.params.model_dump(), "rule": chosen}))


def test_a_plan_is_reviewed_once_its_fusion_is_scored(service: Service) -> None:
    item = window_of(service, [2.0, 1.9, 2.1])
    first = decide_weights(service, item)
    assert not first.is_final
    record_merge(service, item, (1 / 3, 1 / 3, 1 / 3), 1.8)
    reviewed = review_weights(service, item, first)
    assert reviewed.is_final
    assert (first.revision, reviewed.revision) == (0, 1)
    assert reviewed.fusion == first.fusion
    assert [merge.loss for merge in reviewed.merges] == pytest.approx([1.8])
    assert decide_weights(service, item) == reviewed, "the last revision is the window's plan"
    assert review_weights(service, item, reviewed) == reviewed, "there is nothing left to learn"


def test_the_check_of_calibrated_is_recorded_with_what_it_had_expected(service: Service) -> None:
    """With as much noise as here the weights are close to uniform, and the same energy holds."""
    service = weighing_by(service, "calibrated")
    item = window_of(service, [2.0, 1.9, 2.1])
    record_merge(service, item, (1 / 3, 1 / 3, 1 / 3), 1.8)
    first = decide_weights(service, item)
    assert first.notes["noise_energy"] == pytest.approx(0.3)
    weights = np.array([m.weight for m in first.members])
    expected = weights @ [2.0, 1.9, 2.1] - 0.3 * (1 - weights @ weights)
    record_merge(service, item, weights.tolist(), expected + 0.001)
    guide = np.asarray(get_rule("ema")(Observation.of([2.0, 1.9, 2.1])).weights)
    as_expected = guide @ [2.0, 1.9, 2.1] - 0.3 * (1 - guide @ guide)
    record_merge(service, item, guide.tolist(), as_expected)
    reviewed = review_weights(service, item, first)
    (merge,) = (m for m in reviewed.merges if m.weights == weights.tolist())
    assert merge.predicted == pytest.approx(expected)
    assert merge.loss - expected == pytest.approx(0.001)
    assert merge.standard_error is not None
    assert all(m.weight_error is not None for m in reviewed.members)
    assert reviewed.notes["noise_energy.text"] == pytest.approx(0.3)
    assert reviewed.fusion == first.fusion


def test_a_rule_that_expects_no_gain_is_declined_for_its_reason_unmerged(service: Service) -> None:
    service = weighing_by(service, "calibrated")
    item = window_of(service, [2.0, 1.9, 2.1])
    for vector in ((1 / 3, 1 / 3, 1 / 3), (0.0, 0.5, 0.5)):
        record_merge(service, item, vector, float(np.dot(vector, [2.0, 1.9, 2.1])))
    plan = decide_weights(service, item)
    assert not plan.is_merge
    verdict = judge_fusion(service, plan)
    assert verdict.verdict == "declined"
    assert verdict.reason.startswith("no gain expected: the noise energy is")
    assert verdict.comparisons == []


def test_the_gate_judges_the_plan_that_a_rule_corrected(service: Service) -> None:
    plans = [
        plan_record(300, [member(100, 2.0), member(300, 1.9)], fusion=f"f{n}", revision=n)
        for n in (2, 0, 1)
    ]
    for plan in plans:
        service.records.put(plan.fusion, plan)
    assert plans_of(service)["window-300"].fusion == "f2"


def test_a_member_whose_loss_left_the_trend_is_marked_in_the_plan(service: Service) -> None:
    item = window_of(service, [2.0, 2.6, 2.0])
    for n in range(6):
        early = checkpoint_record(10 * n + 10, tokenizer="tokenizer", fingerprint=f"early{n}")
        service.records.put(early.signature, early)
        record_losses(service, early.fingerprint, np.linspace(9, 11, 40) * 2.0)
    for record in item.window.members:
        service.records.put(record.signature, record)
    marks = [m.spike for m in decide_weights(service, item).members]
    assert marks == [None, pytest.approx(0.6), None]


# -- judge -------------------------------------------------------------------------------------


def judged(service: Service, fused: float) -> GateRecord:
    """The verdict on a uniform fusion with this loss, of singles at 2.0, 1.9 and 2.1."""
    item = window_of(service, [2.0, 1.9, 2.1])
    plan = decide_weights(service, item).model_copy(update={"tokenizer": "tokenizer"})
    record_losses(service, plan.fusion, np.linspace(9, 11, 40) * fused)
    return judge_fusion(service, plan)


def test_a_better_fusion_passes_against_the_best_and_the_newest(service: Service) -> None:
    verdict = judged(service, 1.8)
    assert verdict.verdict == "publish"
    assert [(c.against, c.step) for c in verdict.comparisons] == [("best", 200), ("newest", 300)]
    assert [c.gain for c in verdict.comparisons] == pytest.approx([0.1, 0.3])
    assert verdict.test == 1


def test_a_fusion_between_best_and_newest_is_declined_for_the_best(service: Service) -> None:
    verdict = judged(service, 2.0)
    assert verdict.verdict == "declined"
    assert "the best single one (step 200): -0.1000" in verdict.reason


def test_each_window_judged_is_one_more_test_and_the_same_window_is_not(service: Service) -> None:
    first = judged(service, 1.8)
    assert judged(service, 1.8) == first
    plan = decide_weights(service, window_of(service, [2.0, 1.9, 2.1]))
    other = plan.model_copy(update={"tokenizer": "tokenizer", "window": "another"})
    second = judge_fusion(service, other)
    shares = [1 - math.log(2) / math.log(3), math.log(2) / math.log(3) - 0.5]
    assert (first.test, first.alpha) == (1, pytest.approx(0.05 * shares[0]))
    assert (second.test, second.alpha) == (2, pytest.approx(0.05 * sum(shares)))


def test_a_window_judged_again_by_another_measure_spends_no_new_share(service: Service) -> None:
    judged(service, 1.8)
    stricter = service.params.gate.model_copy(update={"minimum_gain": 0.2})
    again = open_service(service.params.model_copy(update={"gate": stricter}))
    verdict = judged(again, 1.8)
    assert verdict.verdict == "declined"
    assert verdict.test == 1


def test_all_weight_on_one_checkpoint_is_declined_unmerged(service: Service) -> None:
    plan = plan_record(300, [member(100, 2.0, 0.0), member(300, 1.9, 1.0)])
    verdict = judge_fusion(service, plan)
    assert verdict.verdict == "declined"
    assert "all weight on step 300" in verdict.reason
    assert verdict.test == 0
    assert judged(service, 1.8).test == 1, "nothing was tested before"
    assert verdict.comparisons == []


def test_a_loss_that_was_never_measured_is_asked_for_in_vain(service: Service) -> None:
    with pytest.raises(RecordError, match="no score on the audit split"):
        losses_of(service, "nobody", "tokenizer", "audit")


def test_a_skip_is_kept_as_it_was_first_said(service: Service) -> None:
    skip(service, Skip("window", 300, "first"))
    skip(service, Skip("window", 300, "second"))
    assert service.records.all(SkipRecord)["window"].reason == "first"
