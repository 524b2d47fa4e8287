"""The merge against a scalar loop, bit for bit, and everything that it refuses."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import ConfigurationError, MismatchedCheckpoints, NonFiniteValues
from ckptfuse.fusion import FusionSpec, check_weights
from ckptfuse.merge import (
    Inputs,
    merge_to_memory,
    merge_to_stores,
    merged_pieces,
    open_inputs,
    write_fusion,
)
from ckptfuse.reading import fingerprint_of, load
from ckptfuse.store import FolderStore, open_store
from tests.helpers import CONFIG, bits, write_checkpoint
from tests.servers import S3Server

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 5), (0,), (4, 0))
WEIGHTS = (0.1, 0.25, 0.65)


def reference(inputs: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The contract, element by element: multiply, round, add, round; oldest first."""
    dtype = inputs[0].dtype
    wide = np.float64 if dtype == torch.float64 else np.float32
    merged = []
    for elements in zip(*(values.flatten() for values in inputs), strict=True):
        total = None
        for element, weight in zip(elements, weights, strict=True):
            if weight != 0:
                product = wide(wide(element.item()) * wide(weight))
                total = product if total is None else wide(total + product)
        merged.append(torch.tensor(float(total), dtype=torch.float64).to(dtype))
    flat = torch.stack(merged) if merged else torch.empty(0, dtype=dtype)
    return flat.reshape(inputs[0].shape)


def state(seed: int, dtypes: Sequence[torch.dtype] = FLOATS) -> dict[str, torch.Tensor]:
    """Tensors of every dtype and odd shape, magnitudes from 1e-4 to 1e3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for dtype in dtypes:
        for shape in SHAPES:
            scale = 10 ** torch.empty(shape).uniform_(-4, 3, generator=generator)
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            tensors[f"{dtype}-{'x'.join(map(str, shape))}"] = values.to(dtype)
    return tensors


def three(folder: Path, **options: object) -> list[dict[str, torch.Tensor]]:
    states = [state(seed) for seed in range(3)]
    for step, tensors in enumerate(states):
        write_checkpoint(folder / f"step{step}", tensors, **options)  # type: ignore[arg-type]
    return states


def opened(folder: Path, count: int = 3, dtype: str | None = None) -> Inputs:
    checkpoints = [open_checkpoint(str(folder / f"step{step}")) for step in range(count)]
    return open_inputs(checkpoints, checkpoints[-1], dtype)


def spec_of(inputs: Inputs, weights: Sequence[float]) -> FusionSpec:
    prints = tuple(fingerprint_of(layout.checkpoint) for layout in inputs.layouts)
    return FusionSpec(prints, tuple(weights), fingerprint_of(inputs.ancillary.checkpoint))


def gather(
    inputs: Inputs, vectors: Sequence[Sequence[float]], piece_elements: int
) -> list[dict[str, bytes]]:
    results: list[dict[str, bytes]] = [{} for _ in vectors]
    for piece, merged in merged_pieces(inputs, vectors, piece_elements=piece_elements):
        for result, values in zip(results, merged, strict=True):
            result[piece.tensor.name] = result.get(piece.tensor.name, b"") + bits(values)
    return results


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("weights", [WEIGHTS, (1 / 3, 1 / 3, 1 / 3), (1.5, -0.75, 0.25)])
def test_a_merge_equals_the_scalar_reference_bit_for_bit(
    tmp_path: Path, weights: tuple[float, ...]
) -> None:
    states = three(tmp_path)
    merged = merge_to_memory(opened(tmp_path), weights)
    assert merged.keys() == states[0].keys()
    for name, values in merged.items():
        expected = reference([tensors[name] for tensors in states], weights)
        assert (values.shape, values.dtype) == (expected.shape, expected.dtype)
        assert bits(values) == bits(expected), name


@pytest.mark.parametrize("piece_elements", [1, 3, 7, 1000])
def test_the_bytes_do_not_depend_on_the_size_of_pieces(tmp_path: Path, piece_elements: int) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    whole = {k: bits(v) for k, v in merge_to_memory(inputs, WEIGHTS).items() if v.numel()}
    (pieced,) = gather(inputs, [WEIGHTS], piece_elements)
    assert pieced == whole


def test_many_weight_vectors_in_one_pass_equal_as_many_passes(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    vectors = [WEIGHTS, (0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3)]
    together = gather(inputs, vectors, 4)
    assert together == [gather(inputs, [vector], 4)[0] for vector in vectors]
    assert len({str(sorted(result.items())) for result in together}) == len(vectors)


def test_a_pass_reads_each_input_once_whatever_the_number_of_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    total = 0
    read_range = FolderStore.read_range

    def counted(self: FolderStore, path: str, start: int, length: int) -> bytes | bytearray:
        nonlocal total
        total += length
        return read_range(self, path, start, length)

    monkeypatch.setattr(FolderStore, "read_range", counted)
    gather(inputs, [WEIGHTS, (0.5, 0.25, 0.25), (0.2, 0.2, 0.6)], 5)
    assert total == 3 * sum(tensor.length for tensor in inputs.ancillary.tensors.values())


def test_an_input_of_weight_zero_is_skipped_and_never_read(tmp_path: Path) -> None:
    states = three(tmp_path)
    inputs = opened(tmp_path)
    weights = tmp_path / "step1" / "model.safetensors"
    stamp = weights.stat()
    start = inputs.layouts[1].headers["model.safetensors"].data_start
    weights.write_bytes(weights.read_bytes()[:start] + b"\xff" * (stamp.st_size - start))  # NaN
    merged = merge_to_memory(inputs, (0.25, 0.0, 0.75))
    for name, values in merged.items():
        expected = reference([states[0][name], states[2][name]], (0.25, 0.75))
        assert bits(values) == bits(expected), name


def test_a_zero_weight_does_not_turn_negative_zero_into_zero(tmp_path: Path) -> None:
    negative = {"w": torch.tensor([-0.0, 0.0, -1.0])}
    write_checkpoint(tmp_path / "step0", negative)
    write_checkpoint(tmp_path / "step1", {"w": torch.tensor([1.0, 2.0, 3.0])})
    merged = merge_to_memory(opened(tmp_path, 2), (1.0, 0.0))
    assert bits(merged["w"]) == bits(negative["w"])


def test_all_weight_on_one_checkpoint_gives_its_own_bytes(tmp_path: Path) -> None:
    states = three(tmp_path)
    merged = merge_to_memory(opened(tmp_path), (0.0, 1.0, 0.0))
    assert {k: bits(v) for k, v in merged.items()} == {k: bits(v) for k, v in states[1].items()}


def test_integers_and_booleans_are_copied_from_the_ancillary_checkpoint(tmp_path: Path) -> None:
    for step in range(2):
        tensors = {
            "weight": torch.full((3,), float(step)),
            "mask": torch.tensor([bool(step), True, False]),
            "count": torch.tensor(10 + step),
            "table": torch.arange(6, dtype=torch.int32).reshape(2, 3) + step,
            "small": torch.tensor([step], dtype=torch.uint8),
            "wide": torch.tensor([7 + step, 8], dtype=torch.uint16),
        }
        write_checkpoint(tmp_path / f"step{step}", tensors)
    (contents,) = merge_to_stores(
        opened(tmp_path, 2), [(0.5, 0.5)], [FolderStore(tmp_path / "out")]
    )
    assert contents.keys() == {"model.safetensors"}
    write_checkpoint(tmp_path / "out2", {"weight": torch.zeros(1)})  # only for its config
    (tmp_path / "out" / "config.json").write_text("{}")
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["weight"].tolist() == [0.5, 0.5, 0.5]
    newest = load_file(tmp_path / "step1" / "model.safetensors")
    for name in ("mask", "count", "table", "small", "wide"):
        assert merged[name].dtype == newest[name].dtype
        assert bits(merged[name]) == bits(newest[name]), name


def test_the_ancillary_source_need_not_be_among_the_inputs(tmp_path: Path) -> None:
    for step in range(3):
        tensors = {"w": torch.tensor([float(step)]), "n": torch.tensor([step])}
        write_checkpoint(tmp_path / f"step{step}", tensors)
    first, second, third = (open_checkpoint(str(tmp_path / f"step{step}")) for step in range(3))
    merged = merge_to_memory(open_inputs([first, second], third), (0.5, 0.5))
    assert (merged["w"].item(), merged["n"].item()) == (0.5, 2)


_IN_A_PROCESS = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[2]))
from pathlib import Path
from tests.unit.test_merge import WEIGHTS, opened
from tests.helpers import bits
from ckptfuse.merge import merge_to_memory
merged = merge_to_memory(opened(Path(sys.argv[1])), WEIGHTS)
print(torch.backends.cpu.get_cpu_capability())
print(hashlib.sha256(b"".join(bits(merged[name]) for name in sorted(merged))).hexdigest())
"""


def test_the_bytes_do_not_depend_on_cpu_capability_or_threads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    for step in range(3):
        large = {
            str(dtype): torch.randn(100_003, generator=generator).to(dtype) for dtype in FLOATS
        }
        write_checkpoint(tmp_path / f"step{step}", large)
    merged = merge_to_memory(opened(tmp_path), WEIGHTS)
    here = hashlib.sha256(b"".join(bits(merged[name]) for name in sorted(merged))).hexdigest()
    for capability, threads in (("default", "1"), (None, "2")):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability or ""}
        if capability is None:
            del environment["ATEN_CPU_CAPABILITY"]
        said = subprocess.run(
            [sys.executable, "-c", _IN_A_PROCESS, str(tmp_path), threads],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert said[-1] == here, (capability, threads)
        assert capability is None or said[0] in ("DEFAULT", "NO", "default")


def test_sharded_inputs_merge_to_the_same_tensors_as_single_files(tmp_path: Path) -> None:
    three(tmp_path / "single")
    three(tmp_path / "sharded", shards=3)
    single = merge_to_memory(opened(tmp_path / "single"), WEIGHTS)
    sharded = merge_to_memory(opened(tmp_path / "sharded"), WEIGHTS)
    assert {k: bits(v) for k, v in single.items()} == {k: bits(v) for k, v in sharded.items()}


def test_a_sharded_fusion_on_disk_holds_what_the_merge_in_memory_holds(tmp_path: Path) -> None:
    three(tmp_path, shards=3)
    inputs = opened(tmp_path)
    out = tmp_path / "out"
    contents = write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(out))
    written = load(open_checkpoint(str(out)))
    in_memory = merge_to_memory(inputs, WEIGHTS)
    assert {k: bits(v) for k, v in written.state_dict.items()} == {
        k: bits(v) for k, v in in_memory.items()
    }
    assert len(list(out.glob("*.safetensors"))) == 3
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (tmp_path / "step2" / index).read_bytes()
    assert {path: written.contents[path] for path in contents if path in written.contents} == {
        path: content for path, content in contents.items() if path in written.contents
    }


def test_repeated_runs_give_the_same_bytes_in_every_file(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    first = write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(tmp_path / "a"))
    second = write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(tmp_path / "b"))
    assert first == second
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert {"model.safetensors", "config.json", "fusion.json", "README.md"} == first.keys()


def test_the_folder_names_its_fusion_and_weights_and_nothing_that_varies(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    spec = spec_of(inputs, WEIGHTS)
    write_fusion(inputs, spec, FolderStore(tmp_path / "out"))
    about = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert about["fusion"] == spec.id
    assert about["weights"] == list(WEIGHTS)
    assert [float.fromhex(weight) for _, weight in about["inputs"]] == list(WEIGHTS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert spec.fingerprints[0][:16] in card
    for text in (json.dumps(about), card):
        assert str(tmp_path) not in text


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_asked_for_changes_tensors_config_and_total_size(
    tmp_path: Path, shards: int, key: str
) -> None:
    config = {**CONFIG, key: "float32"}
    for step in range(2):
        tensors = {"a": torch.full((3,), 1.0 + step), "b": torch.ones(2), "n": torch.tensor([step])}
        write_checkpoint(tmp_path / f"step{step}", tensors, config=config, shards=shards)
    inputs = opened(tmp_path, 2, dtype="bfloat16")
    out = tmp_path / "out"
    write_fusion(inputs, spec_of(inputs, (0.5, 0.5)), FolderStore(out))
    merged = load(open_checkpoint(str(out))).state_dict
    assert (merged["a"].dtype, merged["n"].dtype) == (torch.bfloat16, torch.int64)
    assert merged["a"].tolist() == [1.5, 1.5, 1.5]
    written = json.loads((out / "config.json").read_text())
    assert written[key] == "bfloat16"
    assert set(written) == set(config)
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 5 * 2 + 8


def test_a_wider_output_is_rounded_once_from_the_sum(tmp_path: Path) -> None:
    states = three(tmp_path)
    merged = merge_to_memory(opened(tmp_path, dtype="float32"), WEIGHTS)
    name = "torch.bfloat16-2x3x5"
    widened = [tensors[name].float() for tensors in states]
    assert bits(merged[name]) == bits(reference(widened, WEIGHTS))


def test_different_tensor_names_are_refused_and_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step0", {"shared": torch.ones(1), "early": torch.ones(1)})
    write_checkpoint(tmp_path / "step1", {"shared": torch.ones(1), "late": torch.ones(1)})
    with pytest.raises(MismatchedCheckpoints, match=r"early.*late"):
        opened(tmp_path, 2)


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
def test_different_shapes_and_dtypes_are_refused_and_named(
    tmp_path: Path, other: torch.Tensor
) -> None:
    write_checkpoint(tmp_path / "step0", {"weight": other})
    write_checkpoint(tmp_path / "step1", {"weight": torch.ones(2)})
    with pytest.raises(MismatchedCheckpoints, match=r"'weight'.*step0.*step1"):
        opened(tmp_path, 2)


def test_different_configurations_are_refused_by_key_and_volatile_keys_are_not(
    tmp_path: Path,
) -> None:
    weights = {"weight": torch.ones(2)}
    write_checkpoint(tmp_path / "step0", weights, config={**CONFIG, "rope_theta": 1e4})
    write_checkpoint(tmp_path / "step1", weights, config={**CONFIG, "rope_theta": 5e5})
    with pytest.raises(MismatchedCheckpoints, match="rope_theta"):
        opened(tmp_path, 2)
    write_checkpoint(tmp_path / "step0", weights, config={**CONFIG, "transformers_version": "1"})
    write_checkpoint(tmp_path / "step1", weights, config={**CONFIG, "transformers_version": "2"})
    assert opened(tmp_path, 2)


def test_scaled_dtypes_are_refused_before_any_data_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step0", {"w": torch.ones(2).to(torch.float8_e4m3fn)})
    with pytest.raises(MismatchedCheckpoints, match=r"'w' is F8_E4M3.*bfloat16"):
        opened(tmp_path, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_input_is_named_and_no_folder_is_left(tmp_path: Path, bad: float) -> None:
    write_checkpoint(tmp_path / "step0", {"a": torch.ones(4), "b": torch.ones(4)})
    write_checkpoint(tmp_path / "step1", {"a": torch.ones(4), "b": torch.tensor([1, 1, bad, 1.0])})
    inputs = opened(tmp_path, 2)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(NonFiniteValues, match=r"'b' has 1 NaN or Inf") as caught:
        write_fusion(inputs, spec_of(inputs, (0.5, 0.5)), FolderStore(tmp_path / "out"))
    assert caught.value.checkpoint == "step1"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_overflow_of_the_output_dtype_is_no_checkpoints_fault(tmp_path: Path) -> None:
    for step in range(2):
        write_checkpoint(tmp_path / f"step{step}", {"w": torch.tensor([1.0, 1e6])})
    with pytest.raises(NonFiniteValues, match=r"'w'.*float16.*wider output dtype") as caught:
        merge_to_memory(opened(tmp_path, 2, dtype="float16"), (0.5, 0.5))
    assert caught.value.checkpoint == ""


def test_a_place_that_is_taken_is_refused_and_left_alone(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(ConfigurationError, match="is there already"):
        write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(tmp_path / "out"))
    assert folder_bytes(tmp_path / "out") == {"precious": b"mine"}
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_weights_must_fit_the_inputs_and_be_usable(tmp_path: Path) -> None:
    three(tmp_path)
    with pytest.raises(ConfigurationError, match="2 weights for 3 inputs"):
        merge_to_memory(opened(tmp_path), (0.5, 0.5))
    for weights in ([0.0, 0.0], [float("nan"), 1.0], [float("inf")]):
        with pytest.raises(ConfigurationError, match="weights"):
            check_weights(weights)
    with pytest.raises(ConfigurationError, match="nothing to merge"):
        open_inputs([], opened(tmp_path).ancillary.checkpoint)


def test_the_fusion_id_ignores_inputs_of_weight_zero_and_knows_all_else() -> None:
    spec = FusionSpec(("a", "b"), (0.5, 0.5), "b")
    assert FusionSpec(("a", "z", "b"), (0.5, 0.0, 0.5), "b").id == spec.id
    others = [
        FusionSpec(("b", "a"), (0.5, 0.5), "b"),
        FusionSpec(("a", "b"), (0.5, np.nextafter(0.5, 1)), "b"),
        FusionSpec(("a", "b"), (0.5, 0.5), "a"),
        FusionSpec(("a", "b"), (0.5, 0.5), "b", "float32"),
    ]
    assert len({spec.id, *(other.id for other in others)}) == 5


def test_a_fused_llama_loads_in_transformers_with_the_averaged_weights(
    llamas: list[Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoints = [open_checkpoint(str(path)) for path in llamas]
    inputs = open_inputs(checkpoints, checkpoints[-1])
    out = tmp_path / "fused"
    write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(out))
    assert (out / "generation_config.json").is_file()
    assert (out / "config.json").read_bytes() == (llamas[-1] / "config.json").read_bytes()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    parts = [AutoModelForCausalLM.from_pretrained(path) for path in llamas]
    average = sum(w * p.lm_head.weight.double() for w, p in zip(WEIGHTS, parts, strict=True))
    assert torch.allclose(model.lm_head.weight.double(), average, atol=1e-6)
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_an_s3_prefix_gets_the_same_bytes_as_a_folder(tmp_path: Path, moto_s3: S3Server) -> None:
    three(tmp_path, shards=2)
    inputs = opened(tmp_path)
    contents = write_fusion(inputs, spec_of(inputs, WEIGHTS), FolderStore(tmp_path / "out"))
    remote = open_store("s3://bucket/fused")
    assert write_fusion(inputs, spec_of(inputs, WEIGHTS), remote) == contents
    assert {e.path: remote.read(e.path) for e in remote.list()} == folder_bytes(tmp_path / "out")
    source = open_store("s3://bucket/step2")
    for path, data in folder_bytes(tmp_path / "step2").items():
        source.write(path, data)
    from_s3 = open_inputs(
        [layout.checkpoint for layout in inputs.layouts[:2]]
        + [open_checkpoint("s3://bucket/step2")],
        inputs.ancillary.checkpoint,
    )
    merged, local = merge_to_memory(from_s3, WEIGHTS), merge_to_memory(inputs, WEIGHTS)
    assert {k: bits(v) for k, v in merged.items()} == {k: bits(v) for k, v in local.items()}
