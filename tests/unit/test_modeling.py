"""Models as transformers builds them: without attention of torch's, with code of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    GPT2Config,
    MambaConfig,
    PreTrainedConfig,
)

from ckptfuse.checkpoints import longest_context, open_checkpoint
from ckptfuse.errors import CkptfuseError
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.merge.once import merge_once
from ckptfuse.modeling import build_model
from ckptfuse.perplexity import score_blocks
from ckptfuse.protocol import Numerics
from tests.helpers import blocks_of_lengths

FLOAT32 = Numerics(dtype="float32", attention="sdpa", device_class="cpu")
BLOCKS = blocks_of_lengths([16, 16, 9])
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def nll_of(
    config: dict[str, Any], state_dict: dict[str, torch.Tensor], **options: Any
) -> list[float]:
    model = build_model(config, state_dict, where="here", **{"numerics": FLOAT32, **options})
    return score_blocks(model, BLOCKS, vocabulary=96).nll.tolist()


def by_transformers(model: torch.nn.Module) -> list[float]:
    sums = []
    for index in range(len(BLOCKS)):
        tokens = torch.from_numpy(BLOCKS.block(index)).long()[None]
        with torch.no_grad():
            loss = model(input_ids=tokens, labels=tokens).loss
        sums.append(float(loss) * (tokens.shape[1] - 1))
    return sums


@pytest.fixture
def own(llamas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two of the Llamas as checkpoints of an architecture that only their own code knows."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    paths = []
    for llama in llamas[:2]:
        path = tmp_path / llama.name
        shutil.copytree(llama, path)
        about = json.loads((path / "config.json").read_text())
        about["model_type"] = "own-llama"
        about["auto_map"] = {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        }
        (path / "config.json").write_text(json.dumps(about))
        (path / "modeling_own.py").write_text(OWN_CODE)
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2),
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=["bloom", "mamba"],
)
def test_a_model_without_torchs_attention_is_scored_with_its_own(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = nll_of(config.to_dict(), model.state_dict())
    assert found == pytest.approx(by_transformers(model), rel=1e-5)


def test_what_attention_a_configuration_asks_for_is_no_matter(llamas: list[Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llamas[0])
    asked = model.config.to_dict() | {"_attn_implementation": "flash_attention_2"}
    assert nll_of(asked, model.state_dict()) == pytest.approx(by_transformers(model), rel=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "vaultgemma"])
def test_a_soft_cap_on_attention_counts_and_is_not_scored_without(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, attn_logit_softcapping=0.1,
        initializer_range=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    values = config.to_dict(), model.state_dict()
    found = nll_of(*values, numerics=FLOAT32.model_copy(update={"attention": "eager"}))
    assert found == pytest.approx(by_transformers(model), rel=1e-5)
    model.set_attn_implementation("sdpa")
    assert found != pytest.approx(by_transformers(model), rel=1e-3)
    with pytest.raises(CkptfuseError, match=r"soft cap .*: 0\.1\).*scoring\.attention: eager"):
        nll_of(*values)


def test_a_model_that_reads_what_it_is_to_predict_is_not_scored() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=96, intermediate_size=48, **sizes)
    encoder = BertLMHeadModel(config)
    with pytest.raises(CkptfuseError, match="no causal language model"):
        nll_of(config.to_dict(), encoder.state_dict())
    decoder = BertLMHeadModel(BertConfig(**config.to_dict() | {"is_decoder": True})).eval()
    found = nll_of(decoder.config.to_dict(), decoder.state_dict())
    assert len(found) == len(BLOCKS)


def test_a_models_own_code_runs_where_it_is_trusted(llamas: list[Path], own: list[Path]) -> None:
    known = AutoModelForCausalLM.from_pretrained(llamas[0])
    config = json.loads((own[0] / "config.json").read_text())
    code = {"modeling_own.py": OWN_CODE.encode()}
    found = nll_of(config, known.state_dict(), code=code)
    assert found == pytest.approx(by_transformers(known), rel=1e-5)
    with pytest.raises(CkptfuseError, match="trust_remote_code"):
        nll_of(config, known.state_dict())


def test_a_models_own_code_is_part_of_it_and_travels_with_a_merge(
    own: list[Path], tmp_path: Path
) -> None:
    merge_once(str(tmp_path / "merged"), [str(path) for path in own], [0.5, 0.5])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(merged).__name__ == "OwnForCausalLM"
    before = fingerprint_of(open_checkpoint(str(own[0])))
    (own[0] / "modeling_own.py").write_text(OWN_CODE + "# changed\n")
    assert fingerprint_of(open_checkpoint(str(own[0]))) != before


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 128}, 128),
        (GPT2Config(n_positions=64).to_dict(), 64),
        ({"text_config": {"max_position_embeddings": 32}, "max_position_embeddings": 9}, 32),
        ({"max_position_embeddings": -1}, None),
        ({}, None),
    ],
)
def test_the_longest_context_is_found_under_its_names(
    config: dict[str, object], expected: int | None
) -> None:
    assert longest_context(config) == expected
