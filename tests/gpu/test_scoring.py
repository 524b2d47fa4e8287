"""Scoring on a real GPU: ``make test-gpu``, on a machine that has one.

Needs this repository and what it imports, torch, transformers and pytest; no server.
"""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ckptfuse import blocks as blocks_module
from ckptfuse import compiled, perplexity
from ckptfuse.checks.gpu import gpu
from ckptfuse.devices import slots, visible_gpus
from ckptfuse.jobs import Here
from ckptfuse.log_sum_exp import kernel, log_sum_exp_
from ckptfuse.params import ScoringParams
from ckptfuse.perplexity import score_blocks
from ckptfuse.protocol import BlockSet, CheckpointModel, Event, Input, MergeModel, Numerics, Request
from ckptfuse.record_files import Records
from ckptfuse.records import ScoreRecord
from ckptfuse.score_records import score_key
from ckptfuse.store import FolderStore
from ckptfuse.token_losses import TokenLosses
from tests.helpers import blocks_of_lengths

pytestmark = pytest.mark.gpu

VOCABULARY = 5_003  # no multiple of anything
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 512,
}  # fmt: skip
TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, 64 * 256).astype(np.int32)
BLOCKS = blocks_of_lengths([256] * 63 + [131, 125], tokens=TOKENS, digest="blocks-1")


def make(kind: str = "llama", **changes: object) -> torch.nn.Module:
    """float32, on the CPU, surer of what it says than a model of ordinary random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**LLAMA, "initializer_range": 0.1, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """Of each block, by a plain loop in float64 on the CPU."""
    model = make().double()
    sums = []
    with torch.inference_mode():
        for index in range(len(BLOCKS)):
            tokens = torch.from_numpy(BLOCKS.block(index).astype(np.int64))
            logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
            sums.append(-logits.log_softmax(-1).gather(-1, tokens[1:, None]).sum().item())
    return np.asarray(sums)


@pytest.fixture
def no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile layers for however little work, and anew."""
    monkeypatch.setattr(compiled, "ENOUGH", 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def nll_of(model: torch.nn.Module, batch_tokens: int | None = None, **given: object) -> np.ndarray:
    return score_blocks(
        model, BLOCKS, vocabulary=VOCABULARY, batch_tokens=batch_tokens, **given
    ).nll  # type: ignore[arg-type]


# -- exactness ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("batch_tokens", [None, 1, 5_000])
def test_float32_is_that_of_a_float64_loop_whatever_the_batch(
    expected: np.ndarray, batch_tokens: int | None
) -> None:
    assert nll_of(make().cuda(), batch_tokens) == pytest.approx(expected, rel=1e-6)


def test_bfloat16_is_near_and_the_batch_changes_little(expected: np.ndarray) -> None:
    model = make().to("cuda", torch.bfloat16)
    found = nll_of(model)
    assert found.sum() == pytest.approx(expected.sum(), rel=2e-3)
    assert nll_of(model, 256).sum() == pytest.approx(found.sum(), rel=1e-4)
    assert np.array_equal(nll_of(model), found)


@pytest.mark.usefixtures("no_tf32")
def test_tiles_of_the_vocabulary_change_nothing(
    expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptfuse import token_losses

    monkeypatch.setitem(token_losses.TILE_BYTES, "cuda", 4 * 16 * 255 * 700)
    assert nll_of(make().cuda(), 16 * 256) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 4_096, 128_256 + 7])
def test_the_kernel_sums_what_float64_sums(dtype: torch.dtype, width: int) -> None:
    assert kernel() is not None
    logits = (torch.randn(33, width, device="cuda") * 8).to(dtype)
    logits[3] = -torch.inf
    logits[4, : width // 2] = -torch.inf
    logits[5, width // 2] = torch.nan
    part = logits[:, : max(width - 1, 1)]  # its rows lie further apart than they are long
    exact = part.double().logsumexp(dim=1)
    assert torch.allclose(log_sum_exp_(part), exact, rtol=1e-6, atol=1e-6, equal_nan=True)


# -- compiled layers ---------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tf32", "compiles")
def test_compiled_layers_give_the_same_losses(expected: np.ndarray) -> None:
    said: list[str] = []
    found = score_blocks(
        make().cuda(), BLOCKS, vocabulary=VOCABULARY, batch_tokens=16 * 256, notice=said.append
    )
    assert said == []
    assert found.compiled
    assert found.nll == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 64}),
        ("qwen3", {"head_dim": 64}),
        ("mixtral", {"num_local_experts": 4}),
        ("gpt_neox", {}),
    ],
)
def test_compiled_layers_are_the_same_from_model_to_model(
    kind: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16; the second model uses what was compiled for the first, and both go at once."""
    said: list[str] = []
    model = make(kind, **changes).to("cuda", torch.bfloat16)
    found = nll_of(model, 16 * 256, notice=said.append)
    assert said == []
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    gone = weakref.ref(model)
    del model
    gc.disable()
    try:
        again = make(kind, **changes).to("cuda", torch.bfloat16)
        assert gone() is None
        assert np.array_equal(nll_of(again, 16 * 256), found)
    finally:
        gc.enable()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0, kind
    monkeypatch.setattr(compiled, "ENOUGH", np.inf)
    assert found.sum() == pytest.approx(nll_of(again, 16 * 256).sum(), rel=2e-3)


@pytest.mark.usefixtures("compiles")
def test_a_recurrent_model_is_not_compiled() -> None:
    mamba = make("mamba", state_size=8, num_hidden_layers=1).cuda()
    score_blocks(
        mamba, blocks_of_lengths([16] * 4), vocabulary=VOCABULARY, batch_tokens=32
    )  # its plain code loops over the text
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


# -- memory ------------------------------------------------------------------------------------


def test_the_batch_is_what_fits_beside_others() -> None:
    model = make().to("cuda", torch.bfloat16)
    alone = score_blocks(model, BLOCKS, vocabulary=VOCABULARY).batch_tokens
    free, _ = torch.cuda.mem_get_info()
    others = torch.empty(free - 256 * 2**20, dtype=torch.uint8, device="cuda")
    try:
        beside = score_blocks(model, BLOCKS, vocabulary=VOCABULARY)
    finally:
        del others
        torch.cuda.empty_cache()
    assert alone == perplexity.GPU_BATCH_TOKENS
    assert 256 <= beside.batch_tokens < alone


def test_out_of_memory_halves_the_batch_and_changes_no_loss() -> None:
    model = make().to("cuda", torch.bfloat16)
    nll_of(model, 256)  # what libraries take for themselves
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = nll_of(model, 2**16)
    room = before + (torch.cuda.max_memory_allocated() - before) // 3
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(room / total)
    said: list[str] = []
    try:
        found = score_blocks(
            model, BLOCKS, vocabulary=VOCABULARY, batch_tokens=2**16, notice=said.append
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said
    assert "out of memory: going on with" in said[0]
    assert found.batch_tokens < 63 * 256
    assert found.nll.sum() == pytest.approx(expected.sum(), rel=1e-4)


def test_no_logits_of_a_whole_batch_are_made() -> None:
    model = make(vocab_size=128_256).to("cuda", torch.bfloat16)
    losses = TokenLosses(model, vocabulary=VOCABULARY)
    tokens = torch.from_numpy(TOKENS[: 64 * 256].astype(np.int64)).reshape(64, 256)
    losses(tokens, 1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses(tokens, 1)
    whole = tokens.numel() * 128_256 * 2
    assert torch.cuda.max_memory_allocated() - before < whole / 3


# -- jobs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    model = make().to(torch.bfloat16)
    paths = []
    for step in (100, 200):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        paths.append(folder / f"checkpoint-{step}")
        model.save_pretrained(paths[-1])
    return paths


def test_jobs_on_the_gpu_leave_records_and_give_its_memory_back(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    """Two checkpoints and their merge, as the service asks for them."""
    numerics = Numerics(dtype="bfloat16", attention="sdpa", device_class="cuda")
    blocks_module.save(BLOCKS, tmp_path / "blocks")
    inputs = tuple(Input(uri=str(path)) for path in checkpoints)
    merge = MergeModel(
        fusion="merged", inputs=inputs, weights=(1.0, 0.0), dtype=None, ancillary=inputs[-1]
    )
    request = Request(
        models=(*(CheckpointModel(input=item) for item in inputs), merge),
        blocks=(BlockSet(folder=str(tmp_path / "blocks"), digest=BLOCKS.digest, split="audit"),),
        numerics=numerics,
        records=str(tmp_path / "records"),
    )
    events: list[Event] = []
    before, _ = torch.cuda.mem_get_info()
    answers = Here().run(request, 1, progress=events.append)
    after, _ = torch.cuda.mem_get_info()
    assert [answer.failed for answer in answers] == [None] * 3
    assert after == pytest.approx(before, abs=64 * 2**20)

    def nll(model_id: str) -> np.ndarray:
        key = score_key(model_id=model_id, blocks=BLOCKS.digest, numerics=numerics)
        return Records(FolderStore(tmp_path / "records")).arrays(ScoreRecord, key)["nll"]

    first, second = (answer.fingerprint for answer in answers[:2])
    assert first is not None
    assert second is not None
    model = AutoModelForCausalLM.from_pretrained(checkpoints[0], dtype=torch.bfloat16)
    assert np.array_equal(nll(first), nll_of(model.eval().cuda()))
    assert np.array_equal(nll("merged"), nll(first))
    assert not np.array_equal(nll(second), nll(first))


def test_the_service_takes_the_gpu_by_itself_and_the_doctor_says_it_is_well() -> None:
    params = ScoringParams()
    assert params.device_class == "cuda"
    assert len(slots("cuda", 1)) == len(visible_gpus()) == torch.cuda.device_count()
    check = gpu(params, model=10**9)
    assert check.state == "ok", check
    assert torch.cuda.get_device_name() in check.said
