"""Compiled layers: used for one shape of batches, checked, and given up for any reason.

dynamo traces here as it does on a GPU, and what it traced is run as it is: torch's compiler for
CPUs takes half a minute, and none of its kernels is a GPU's. ``make test-gpu`` has those.
"""

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from ckptfuse import compiled as module
from ckptfuse.compiled import compiled_where_it_pays, keep_in
from ckptfuse.perplexity import score_blocks
from ckptfuse.token_losses import TokenLosses
from tests.helpers import blocks_of_lengths

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(1))


def make(kind: str = "llama", **changes: object) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**SMALL, **changes})
    ).eval()


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


@pytest.fixture(autouse=True)
def nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_given_up", set())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    torch._dynamo.reset()
    counter = CompileCounter()
    traced = torch.compile(module._forward, backend=counter, dynamic=False, fullgraph=True)
    monkeypatch.setattr(module, "_compiled_forward", lambda: traced)
    return counter


def losses_of(
    model: torch.nn.Module, notice: Callable[[str], None] = lambda text: None
) -> module.CompiledLosses:
    plain = TokenLosses(model, vocabulary=96)
    return module.CompiledLosses(plain, layers_of(model), (4, 16), notice)


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "mixtral", "olmo2", "phi3"],
)
def test_one_graph_serves_all_layers_and_the_next_model_too(
    kind: str, graphs: CompileCounter
) -> None:
    own = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "num_local_experts": 2}
    said: list[str] = []
    for _ in range(2):
        model = make(kind, **own)
        assert len(layers_of(model)) == 3
        losses = losses_of(model, said.append)
        found = losses(TOKENS, 1)
        assert torch.allclose(found, TokenLosses(model, vocabulary=96)(TOKENS, 1), rtol=1e-6)
    assert said == []
    assert graphs.frame_count == 1


def test_the_shape_that_most_tokens_are_scored_in_is_compiled(
    graphs: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    blocks = blocks_of_lengths([9] * 3 + [16] * 9 + [5])
    expected = score_blocks(model, blocks, vocabulary=96, batch_tokens=64)
    assert graphs.frame_count == 0
    monkeypatch.setattr(module, "_DEVICE", "cpu")
    monkeypatch.setattr(module, "ENOUGH", 2 * 128 * sum(p.numel() for p in model.parameters()))
    found = score_blocks(model, blocks, vocabulary=96, batch_tokens=64)
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    assert (found.compiled, expected.compiled) == (True, False)
    assert graphs.frame_count == 1
    shorter = blocks_of_lengths([9] * 3 + [16] * 7 + [5])  # one full batch less
    score_blocks(make("mistral"), shorter, vocabulary=96, batch_tokens=64)
    assert graphs.frame_count == 1


def test_other_shapes_are_scored_as_before(graphs: CompileCounter) -> None:
    losses = losses_of(make())
    losses(TOKENS[:3], 1)
    losses(TOKENS[:, :9], 1)
    assert graphs.frame_count == 0
    losses(TOKENS, 1)
    losses(TOKENS, 5)  # the head's business
    assert graphs.frame_count == 1


@pytest.mark.usefixtures("graphs")
def test_a_model_is_left_as_it_was_and_goes_with_its_last_reference() -> None:
    model = make()
    before = [set(layer.__dict__) for layer in layers_of(model)]
    losses = losses_of(model)
    losses(TOKENS, 1)
    assert [set(layer.__dict__) for layer in layers_of(model)] == before
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, losses
        assert gone() is None
    finally:
        gc.enable()


def test_a_compiler_that_fails_is_told_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(module, "_compiled_forward", lambda: fail)
    said: list[str] = []
    model = make()
    losses, expected = losses_of(model, said.append), TokenLosses(model, vocabulary=96)(TOKENS, 1)
    assert torch.equal(losses(TOKENS, 1), expected)
    assert torch.equal(losses(TOKENS, 1), expected)
    assert torch.equal(losses_of(make(), said.append)(TOKENS, 1), expected)
    assert said == ["going on without torch.compile: RuntimeError: no C compiler"]
    assert not losses.is_used


def test_layers_that_compile_to_something_else_are_found_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(layer: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
        return module._forward(layer, *arguments, **named).roll(1, dims=1)

    monkeypatch.setattr(module, "_compiled_forward", lambda: forward)
    said: list[str] = []
    model = make(initializer_range=0.5)
    losses, expected = losses_of(model, said.append), TokenLosses(model, vocabulary=96)(TOKENS, 1)
    assert torch.equal(losses(TOKENS, 1), expected)
    (text,) = said
    assert "going on without torch.compile: it gives" in text


def test_out_of_memory_is_for_the_caller_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_compiled_forward", lambda: fail)
    with pytest.raises(torch.OutOfMemoryError):
        losses_of(make())(TOKENS, 1)


def test_what_is_compiled_is_a_gpus_large_work_on_layers_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make()
    plain = TokenLosses(model, vocabulary=96)

    def chosen(network: torch.nn.Module, tokens: int) -> bool:
        found = compiled_where_it_pays(plain, network, (4, 16), tokens, lambda text: None)
        return found is not None

    parameters = sum(parameter.numel() for parameter in model.parameters())
    enough = int(module.ENOUGH / 2 / parameters) + 1
    assert not chosen(model, enough)  # on a CPU
    monkeypatch.setattr(module, "_DEVICE", "cpu")
    assert chosen(model, enough)
    assert not chosen(model, enough - 2)
    assert not chosen(make("mamba"), enough)
    own = make()
    own.model.layers[1].mlp.__class__ = type("Own", (type(own.model.layers[1].mlp),), {})
    assert not chosen(own, enough)
    hooked = make()
    hooked.model.layers[1].forward = hooked.model.layers[1].forward
    assert not chosen(hooked, enough)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert not chosen(model, enough)


def test_what_was_compiled_lies_in_the_workspace_unless_the_environment_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # to be put back as it was
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_in(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_a_layer_that_is_no_one_graph_is_scored_as_it_is(graphs: CompileCounter) -> None:
    """DBRX's experts loop over how many tokens they have, which only the data says."""
    model = make(
        "dbrx", d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 32},
    )  # fmt: skip
    said: list[str] = []
    losses, expected = losses_of(model, said.append), TokenLosses(model, vocabulary=96)(TOKENS, 1)
    assert torch.equal(losses(TOKENS, 1), expected)
    (text,) = said
    assert text.startswith("going on without torch.compile: ")
    assert graphs.frame_count == 0


def test_torch_knows_the_options_that_it_is_given() -> None:
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        torch.compile(module._forward, options={"no such": True})
    assert callable(module._compiled_forward.__wrapped__())
