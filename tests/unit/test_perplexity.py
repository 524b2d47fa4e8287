"""Scoring a real tiny Llama, against transformers' own loss."""

from collections.abc import Sequence
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptfuse.blocks import Blocks
from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import CkptfuseError, DamagedCheckpoint
from ckptfuse.modeling import build_model, vocabulary_size
from ckptfuse.perplexity import groups, score_blocks
from ckptfuse.protocol import Numerics
from ckptfuse.reading import Loaded, load
from tests.helpers import blocks_of_lengths

FLOAT32 = Numerics(dtype="float32", attention="sdpa", device_class="cpu")
LENGTHS = [16] * 5 + [9] + [16] * 3 + [2]


@pytest.fixture(scope="module")
def llama(llamas: list[Path]) -> Loaded:
    return load(open_checkpoint(str(llamas[0])))


@pytest.fixture(scope="module")
def model(llama: Loaded) -> torch.nn.Module:
    return build(llama)


def build(llama: Loaded, numerics: Numerics = FLOAT32) -> torch.nn.Module:
    return build_model(
        llama.layout.config, llama.state_dict, numerics=numerics, where="checkpoint-100"
    )


def nll_of(model: torch.nn.Module, blocks: Blocks, batch_tokens: int = 64) -> np.ndarray:
    return score_blocks(model, blocks, vocabulary=96, batch_tokens=batch_tokens).nll


def by_transformers(model: torch.nn.Module, blocks: Blocks) -> list[float]:
    """Each block's mean loss by transformers, times the tokens that it predicts."""
    sums = []
    for index in range(len(blocks)):
        tokens = torch.from_numpy(blocks.block(index).astype(np.int64))[None]
        with torch.no_grad():
            loss = model(input_ids=tokens, labels=tokens).loss
        sums.append(float(loss) * (tokens.shape[1] - 1))
    return sums


def test_the_loss_of_each_block_is_that_of_transformers(model: torch.nn.Module) -> None:
    blocks = blocks_of_lengths(LENGTHS)
    found = nll_of(model, blocks)
    assert found.dtype == np.float64
    assert found == pytest.approx(by_transformers(model, blocks), rel=1e-5)


def test_a_random_model_knows_about_as_much_as_a_guess(model: torch.nn.Module) -> None:
    blocks = blocks_of_lengths([64] * 8)
    loss = nll_of(model, blocks).sum() / blocks.predicted.sum()
    assert loss == pytest.approx(np.log(96), abs=0.5)


@pytest.mark.parametrize("batch_tokens", [1, 33, 10_000])
def test_the_batch_size_changes_no_loss(model: torch.nn.Module, batch_tokens: int) -> None:
    blocks = blocks_of_lengths(LENGTHS)
    one_by_one = nll_of(model, blocks, 1)
    assert nll_of(model, blocks, batch_tokens) == pytest.approx(one_by_one, rel=1e-5)


def test_a_block_does_not_see_the_blocks_around_it(model: torch.nn.Module) -> None:
    blocks = blocks_of_lengths([16] * 4)
    alone = blocks_of_lengths([16], tokens=blocks.block(2))
    assert nll_of(model, alone)[0] == pytest.approx(nll_of(model, blocks)[2], rel=1e-5)


def test_progress_ends_at_the_number_of_blocks(model: torch.nn.Module) -> None:
    told: list[int] = []
    score_blocks(
        model, blocks_of_lengths(LENGTHS), vocabulary=96, batch_tokens=32, progress=told.append
    )
    assert told == sorted(set(told))
    assert told[-1] == len(LENGTHS)


def test_a_token_outside_of_the_vocabulary_is_told_before_any_work(model: torch.nn.Module) -> None:
    blocks = blocks_of_lengths([4], tokens=np.array([1, 2, 96, 3], dtype=np.int32))
    with pytest.raises(CkptfuseError, match=r"token 96 .*vocabulary of 96.*corpus\.tokenizer"):
        nll_of(model, blocks)


@given(st.lists(st.tuples(st.integers(3, 5), st.integers(1, 2)), min_size=1, max_size=30))
def test_groups_hold_every_block_once_and_each_group_one_shape(
    shapes: Sequence[tuple[int, int]],
) -> None:
    lengths, context = zip(*shapes, strict=True)
    found = list(groups(blocks_of_lengths(lengths, context=context)))
    assert sorted(index for group in found for index in group) == list(range(len(shapes)))
    assert len(found) == len(set(shapes))
    for group in found:
        assert len({shapes[index] for index in group}) == 1


# -- models from state dicts -------------------------------------------------------------------


def test_tied_embeddings_are_tied_again(model: torch.nn.Module, llama: Loaded) -> None:
    assert "lm_head.weight" not in llama.state_dict
    tied = model.lm_head.weight, model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    assert vocabulary_size(model) == 96


def test_a_model_is_scored_in_the_dtype_that_was_asked_for(llama: Loaded) -> None:
    numerics = FLOAT32.model_copy(update={"dtype": "bfloat16"})
    half = build(llama, numerics)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    blocks = blocks_of_lengths(LENGTHS)
    assert nll_of(half, blocks) == pytest.approx(nll_of(build(llama), blocks), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, "missing keys, first model.layers.2"),
        ({"num_hidden_layers": 1}, "unexpected keys, first model.layers.1"),
        ({"vocab_size": 95}, r"embed_tokens.weight is \[96, 32\] where \[95, 32\] is expected"),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_not_scored(
    llama: Loaded, changes: dict[str, object], said: str
) -> None:
    config = {**llama.layout.config, **changes}
    with pytest.raises(DamagedCheckpoint, match=said):
        build_model(config, llama.state_dict, numerics=FLOAT32, where="checkpoint-100")


def test_a_model_that_is_unknown_here_is_no_fault_of_its_checkpoint(llama: Loaded) -> None:
    config = {**llama.layout.config, "model_type": "no-such-model"}
    with pytest.raises(CkptfuseError, match="cannot build this model") as raised:
        build_model(config, llama.state_dict, numerics=FLOAT32, where="checkpoint-100")
    assert not isinstance(raised.value, DamagedCheckpoint)


def test_a_model_whose_parts_lie_in_two_places_has_the_same_losses(
    llama: Loaded, tmp_path: Path
) -> None:
    """Without a second GPU the other place is the disk: accelerate's hooks are the same.

    They stand in for each part's forward and fetch what it needs; between passes the part's own
    weights are without values.
    """
    here = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk"}
    spread = accelerate.dispatch_model(
        build(llama), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert {weight.device.type for weight in spread.parameters()} == {"cpu", "meta"}
    blocks = blocks_of_lengths(LENGTHS)
    assert nll_of(spread, blocks) == pytest.approx(nll_of(build(llama), blocks), rel=1e-6)
