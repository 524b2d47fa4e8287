"""Heads on parts of the vocabulary: the same losses as the whole model's, whatever the model."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ckptfuse import perplexity
from ckptfuse import token_losses as module
from ckptfuse.errors import CkptfuseError
from ckptfuse.log_sum_exp import log_sum_exp_
from ckptfuse.perplexity import score_blocks
from ckptfuse.token_losses import TokenLosses
from tests.helpers import blocks_of_lengths

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {},
    "gpt_neox": {},
    "gemma2": {"final_logit_softcapping": 3.0, "initializer_range": 0.5},
    "cohere": {"logit_scale": 0.3},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mamba": {},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 64},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "is_decoder": True},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**SMALL, **ARCHITECTURES[request.param]})
    return AutoModelForCausalLM.from_config(config).eval()


def reference(model: torch.nn.Module, tokens: torch.Tensor, context: int) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits[:, context - 1 : -1].double()
        chosen = logits.log_softmax(-1).gather(-1, tokens[:, context:, None])
    return -chosen.sum(dim=(1, 2))


@pytest.mark.parametrize("context", [1, 5])
def test_the_losses_of_a_head_in_parts_are_those_of_the_whole_model(
    model: torch.nn.Module, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE_BYTES", {"cpu": 4 * 33 * 7})
    tokens = torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(1))
    found = TokenLosses(model, vocabulary=96)(tokens, context)
    assert found.dtype == torch.float64
    assert torch.allclose(found, reference(model, tokens, context), rtol=1e-5)


def test_no_architecture_here_makes_the_logits_of_a_batch(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = copy.deepcopy(model)
    monkeypatch.setattr(module, "TILE_BYTES", {"cpu": 4 * 96 * 16})
    losses = TokenLosses(network, vocabulary=96)
    largest = 0

    def watch(_: object, __: object, logits: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, logits.numel())

    network.get_output_embeddings().register_forward_hook(watch)
    losses(torch.zeros(8, 16, dtype=torch.int64), 1)
    assert largest == 8 * 15 * (4 * 96 * 16 // (4 * 8 * 15))


def test_a_model_whose_head_cannot_be_run_by_parts_is_told(llama: torch.nn.Module) -> None:
    said: list[str] = []
    blocks = blocks_of_lengths([16])
    score_blocks(llama, blocks, vocabulary=96, notice=said.append)
    assert said == []
    score_blocks(Memory(llama, 99), blocks, vocabulary=96, notice=said.append)
    assert said == [perplexity.WHOLE]


def test_a_scored_model_goes_with_its_last_reference() -> None:
    """Until garbage was collected a job would hold two models, on a GPU above all."""
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()
    gone = weakref.ref(network)
    gc.disable()
    try:
        TokenLosses(network, vocabulary=96)(torch.zeros(2, 4, dtype=torch.int64), 1)
        del network
        assert gone() is None
    finally:
        gc.enable()


def test_logits_of_fewer_bits_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 1001, generator=generator) * 8).to(torch.bfloat16)
    logits[3] = -torch.inf
    found, as_float = log_sum_exp_(logits.clone()), log_sum_exp_(logits.float())
    assert torch.equal(found, as_float)
    finite = torch.arange(7) != 3
    expected = logits.double().logsumexp(dim=1)
    assert torch.allclose(found[finite], expected[finite], rtol=1e-6)


def test_a_model_is_left_as_it_was(model: torch.nn.Module) -> None:
    before = dict(model.base_model.__dict__)
    weight = model.get_output_embeddings().weight
    TokenLosses(model, vocabulary=96)(torch.zeros(1, 4, dtype=torch.int64), 1)
    assert model.base_model.__dict__.keys() == before.keys()
    assert model.get_output_embeddings().weight is weight


class Memory(torch.nn.Module):
    """A device with room for so many tokens. No real one runs out at a known size."""

    def __init__(self, model: torch.nn.Module, room: int) -> None:
        super().__init__()
        self.model, self.room, self.base_model = model, room, self

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        if input_ids.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(input_ids=input_ids, use_cache=use_cache)


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()


def test_out_of_memory_halves_the_batch_says_so_and_changes_no_loss(
    llama: torch.nn.Module,
) -> None:
    blocks = blocks_of_lengths([16] * 9 + [5])
    expected = score_blocks(llama, blocks, vocabulary=96, batch_tokens=16).nll
    said: list[str] = []
    found = score_blocks(
        Memory(llama, 3 * 15), blocks, vocabulary=96, batch_tokens=160, notice=said.append
    )
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.batch_tokens == 32
    halved = [f"out of memory: going on with {size} tokens a batch" for size in (64, 32)]
    assert said == [perplexity.WHOLE, *halved], "its logits are those of whole batches, by the way"


def test_a_block_that_does_not_fit_by_itself_is_an_error_that_says_what_to_do(
    llama: torch.nn.Module,
) -> None:
    with pytest.raises(CkptfuseError, match=r"single block of 16 tokens .*scoring\.block_length"):
        score_blocks(Memory(llama, 8), blocks_of_lengths([16]), vocabulary=96)


def test_a_cpu_takes_a_batch_of_its_own_size_when_none_is_given(llama: torch.nn.Module) -> None:
    found = score_blocks(llama, blocks_of_lengths([16]), vocabulary=96)
    assert found.batch_tokens == perplexity.CPU_BATCH_TOKENS


def test_a_model_that_rules_out_some_of_its_vocabulary(
    llama: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = copy.deepcopy(llama)
    network.lm_head = torch.nn.Linear(32, 96)
    network.lm_head.bias.data[:50] = -torch.inf
    monkeypatch.setattr(module, "TILE_BYTES", {"cpu": 4 * 33 * 7})  # whole tiles of -inf
    tokens = torch.randint(50, 96, (3, 16), generator=torch.Generator().manual_seed(1))
    found = TokenLosses(network, vocabulary=96)(tokens, 1)
    assert torch.allclose(found, reference(network, tokens, 1), rtol=1e-5)
