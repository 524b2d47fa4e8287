"""A trainer's own layout scored through the worked example, against the same model in our own."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ckptfuse.checkpoints import Contents, open_checkpoint
from ckptfuse.conversion import check_converter, convert, identity, made_by
from ckptfuse.digests import content_digest
from ckptfuse.errors import CkptfuseError, ConfigurationError, ConversionError
from ckptfuse.fingerprints import fingerprint_of
from ckptfuse.fusion import FusionSpec, Recipe
from ckptfuse.imports import load_function
from ckptfuse.layouts import read_layout
from ckptfuse.merge.converted import write_converted
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.merge.once import merge_once
from ckptfuse.once import HandScore, score_once
from examples.torchtitan_llama import _LAYER, _TOP
from tests.unit.test_blocks import write_tokenizer

EXAMPLE = "examples.torchtitan_llama:to_hf"


def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of the example's reordering: halves of each head to neighbours."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def as_torchtitan(source: Path, folder: Path) -> None:
    """The model in torchtitan's names and order, saved as a distributed checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(source)
    config = model.config
    ours = {theirs: name for name, theirs in _TOP.items()}
    layer = {theirs: name for name, theirs in _LAYER.items()}
    state = {}
    for name, values in model.state_dict().items():
        if name in ours:
            state[ours[name]] = values.clone()
            continue
        _, _, number, rest = name.split(".", 3)
        if rest == "self_attn.q_proj.weight":
            values = pairs(values, config.num_attention_heads)
        elif rest == "self_attn.k_proj.weight":
            values = pairs(values, config.num_key_value_heads)
        state[f"layers.{number}.{layer[rest]}"] = values.clone()
    dcp.save({**state, "optimizer": {"state.exp_avg": torch.ones(3)}}, checkpoint_id=folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of a tiny Llama with untied embeddings, each with a tokenizer."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("models") / f"checkpoint-{seed}"
        LlamaForCausalLM(config).save_pretrained(path)
        write_tokenizer(path, bos_token="<s>")
        paths.append(path)
    return paths


@pytest.fixture
def text(tmp_path: Path) -> dict[str, str]:
    lines = [json.dumps({"text": f"the {word} of words"}) for word in "abcdefgh"]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return {"text": str(tmp_path / "text.jsonl")}


def loss(score: HandScore) -> float:
    return score.domains["text"].loss


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_native_checkpoint_and_a_native_merge_score_as_their_hugging_face_forms(
    models: list[Path], tmp_path: Path, text: dict[str, str]
) -> None:
    natives = [tmp_path / f"step-{number}" for number in (1, 2)]
    for source, native in zip(models, natives, strict=True):
        as_torchtitan(source, native)
    options = {"converter": EXAMPLE, "model": str(models[0])}
    direct = score_once(str(models[0]), text)
    through = score_once(str(natives[0]), text, **options)  # type: ignore[arg-type]
    assert math.isclose(loss(through), loss(direct), rel_tol=1e-6)

    merge_once(str(tmp_path / "hf-merge"), [str(path) for path in models], (0.5, 0.5))
    out = str(tmp_path / "native-merge")
    merge_once(out, [str(path) for path in natives], (0.5, 0.5), recipe=Recipe(form="dcp"))
    direct = score_once(str(tmp_path / "hf-merge"), text)
    through = score_once(out, text, **options)  # type: ignore[arg-type]
    assert math.isclose(loss(through), loss(direct), rel_tol=1e-6)


def test_a_native_merge_becomes_the_folder_that_a_merge_of_converted_models_is(
    models: list[Path], tmp_path: Path
) -> None:
    natives = [tmp_path / f"step-{number}" for number in (1, 2)]
    for source, native in zip(models, natives, strict=True):
        as_torchtitan(source, native)
    opened = [open_checkpoint(str(path)) for path in natives]
    recipe = Recipe(dtype="bfloat16", converted=made_by(EXAMPLE, str(models[0])))
    prints = tuple(fingerprint_of(checkpoint) for checkpoint in opened)
    spec = FusionSpec(prints, (0.25, 0.75), prints[-1], recipe)

    def write(name: str) -> Contents:
        return write_converted(
            open_inputs(opened, opened[-1], recipe), spec, tmp_path / name,
            converter=EXAMPLE, model=str(models[0]),
        )  # fmt: skip

    contents = write("made")
    found = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert {n: (len(data), content_digest(data)) for n, data in found.items()} == contents
    assert json.loads(found["fusion.json"])["fusion"] == spec.id
    assert "tokenizer.json" in found
    assert EXAMPLE in found["README.md"].decode()
    assert write("again") == contents

    merge_once(
        str(tmp_path / "hf"), [str(path) for path in models], (0.25, 0.75),
        recipe=Recipe(dtype="bfloat16"),
    )  # fmt: skip
    made, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict()
        for name in ("made", "hf")
    )
    assert made.keys() == expected.keys()
    for name, values in made.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, expected[name]), name


def test_what_a_converted_merge_is_made_by_covers_converter_configuration_and_tokenizer(
    models: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(models[0], folder)
    known = made_by(EXAMPLE, str(folder))
    assert made_by(EXAMPLE, str(models[0])) == known
    assert made_by(None, str(folder)) != known
    (folder / "tokenizer_config.json").write_text("{}")
    assert made_by(EXAMPLE, str(folder)) != known


def test_without_a_converter_a_native_layout_is_refused(
    models: list[Path], tmp_path: Path, text: dict[str, str]
) -> None:
    as_torchtitan(models[0], tmp_path / "step-1")
    with pytest.raises(CkptfuseError, match="do not fit"):
        score_once(str(tmp_path / "step-1"), text, model=str(models[0]))


def test_a_converter_must_be_there_and_know_the_tensors(models: list[Path], tmp_path: Path) -> None:
    for name in ("nothing", "no.such.module:f", "json:no_such_function", "json:__name__"):
        with pytest.raises(ConfigurationError, match="converter"):
            load_function(name, "converter")
    with pytest.raises(ConfigurationError, match=r"scoring\.model"):
        identity(EXAMPLE, None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"config\.json: not JSON"):
        convert(None, str(tmp_path), {}, "here")
    strange = {"layers.0.attention.wz.weight": torch.ones(2, 2)}
    with pytest.raises(ConversionError, match=r"here.*wz"):
        convert(EXAMPLE, str(models[0]), strange, "here")


def misspelt(tensors: dict[str, torch.Tensor], config: object) -> dict[str, torch.Tensor]:
    return {"x": tensors["no.such.tensor"]}


def by_way_of_numpy(tensors: dict[str, torch.Tensor], config: object) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values.numpy()) for name, values in tensors.items()}


def test_a_slip_in_a_converter_is_told_before_any_weights_are_read(models: list[Path]) -> None:
    layout = read_layout(open_checkpoint(str(models[0])))
    with pytest.raises(
        ConversionError, match=r"checkpoint-0: converter .*misspelt.*no\.such\.tensor"
    ):
        check_converter(f"{__name__}:misspelt", str(models[0]), layout)
    check_converter(f"{__name__}:by_way_of_numpy", str(models[0]), layout)
