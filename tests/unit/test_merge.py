"""The arithmetic of a merge against a scalar loop, bit for bit, and the inputs that it refuses."""

import hashlib
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ckptfuse import digests
from ckptfuse.checkpoints import config_identity, open_checkpoint
from ckptfuse.digests import digest
from ckptfuse.errors import (
    ChangedCheckpoint,
    ConfigurationError,
    MismatchedCheckpoints,
    NonFiniteValues,
)
from ckptfuse.formats.safetensors import encode_header
from ckptfuse.fusion import Recipe, check_weights
from ckptfuse.merge import passes
from ckptfuse.merge.folder import merge_to_stores
from ckptfuse.merge.inputs import Inputs, open_inputs
from ckptfuse.merge.memory import merge_to_memory
from ckptfuse.store import FolderStore
from ckptfuse.store.folder import _Reader
from ckptfuse.torch_dtypes import DTYPES
from tests.helpers import CONFIG, bits, make_older, write_checkpoint

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


def write_unaligned(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A checkpoint whose file holds the tensors by name backwards, wherever that puts them."""
    write_checkpoint(folder, {"placeholder": torch.zeros(1)})
    names = sorted(tensors, reverse=True)
    dtypes = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
    entries = [(name, dtypes[tensors[name].dtype], tuple(tensors[name].shape)) for name in names]
    data = b"".join(bits(tensors[name]) for name in names)
    (folder / "model.safetensors").write_bytes(encode_header(entries, {}) + data)
    make_older(folder, 3600)


def three(folder: Path, **options: object) -> list[dict[str, torch.Tensor]]:
    states = [state(seed) for seed in range(3)]
    for step, tensors in enumerate(states):
        write_checkpoint(folder / f"step{step}", tensors, **options)  # type: ignore[arg-type]
    return states


def opened(folder: Path, count: int = 3, dtype: str | None = None) -> Inputs:
    checkpoints = [open_checkpoint(str(folder / f"step{step}")) for step in range(count)]
    return open_inputs(checkpoints, checkpoints[-1], Recipe(dtype=dtype))


def gather(
    folder: Path, inputs: Inputs, vectors: Sequence[Sequence[float]]
) -> list[dict[str, bytes]]:
    """The tensors of each vector's merge, all written to disk in one pass."""
    stores = [FolderStore(folder / f"out-{uuid.uuid4().hex}") for _ in vectors]
    merge_to_stores(inputs, vectors, stores)
    return [
        {
            name: bits(values)
            for file in sorted(store.root.glob("*.safetensors"))
            for name, values in load_file(file).items()
        }
        for store in stores
    ]


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


@pytest.mark.parametrize("block_elements", [1, 3, 7, 1000])
def test_the_bytes_do_not_depend_on_the_size_of_blocks(tmp_path: Path, block_elements: int) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    whole = {k: bits(v) for k, v in merge_to_memory(inputs, WEIGHTS).items()}
    blocks = merge_to_memory(inputs, WEIGHTS, block_elements=block_elements)
    assert {k: bits(v) for k, v in blocks.items()} == whole


@pytest.mark.parametrize("leaf", [8, 24, 40, 4096])
@pytest.mark.parametrize("request_size", [1, 6, 100])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_elements_on_the_border_of_leaves_and_requests_come_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaf: int, request_size: int, shift: int
) -> None:
    """A tensor of ``shift`` bytes in front lets every later one start at an odd place."""
    states = [state(seed) for seed in range(3)]
    for step, tensors in enumerate(states):
        tensors["shift"] = torch.arange(shift, dtype=torch.uint8)
        write_unaligned(tmp_path / f"step{step}", tensors)
    inputs = opened(tmp_path)
    expected = {k: bits(v) for k, v in merge_to_memory(inputs, WEIGHTS).items()}
    monkeypatch.setattr(digests, "LEAF_SIZE", leaf)
    monkeypatch.setattr(FolderStore, "request_size", request_size)
    merged = merge_to_memory(inputs, WEIGHTS)
    assert {k: bits(v) for k, v in merged.items()} == expected
    for name in states[0]:
        if name != "shift":
            wanted = reference([tensors[name] for tensors in states], WEIGHTS)
            assert expected[name] == bits(wanted), name


def rounded_to(dtype: torch.dtype, values: np.ndarray) -> np.ndarray:
    """The bits of float32 values in 16 bits, to nearest, ties to even, by integers alone."""
    if dtype == torch.float16:
        return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_value_of_sixteen_bits_is_merged_right(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Subnormals, both zeros and the largest included, each paired with two others."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    finite = every[torch.isfinite(every)]
    generator = torch.Generator().manual_seed(7)
    columns = [finite[torch.randperm(len(finite), generator=generator)] for _ in range(3)]
    for step, values in enumerate(columns):
        write_checkpoint(tmp_path / f"step{step}", {"w": values})
    merged = merge_to_memory(opened(tmp_path), WEIGHTS)["w"]
    first, second, third = (values.float().numpy() for values in columns)
    a, b, c = (np.float32(weight) for weight in WEIGHTS)
    expected = rounded_to(dtype, (first * a + second * b) + third * c)
    assert bits(merged) == expected.tobytes()


def test_many_weight_vectors_in_one_pass_equal_as_many_passes(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    vectors = [WEIGHTS, (0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3)]
    together = gather(tmp_path, inputs, vectors)
    assert together == [gather(tmp_path, inputs, [vector])[0] for vector in vectors]
    assert len({str(sorted(result.items())) for result in together}) == len(vectors)


def test_a_pass_reads_each_input_once_whatever_the_number_of_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    total = 0
    read_into = _Reader.read_into

    def counted(self: _Reader, start: int, view: memoryview) -> None:
        nonlocal total
        total += len(view)
        read_into(self, start, view)

    monkeypatch.setattr(_Reader, "read_into", counted)
    gather(tmp_path, inputs, [WEIGHTS, (0.5, 0.25, 0.25), (0.2, 0.2, 0.6)])
    assert total == 3 * sum(tensor.length for tensor in inputs.ancillary.tensors.values())


def test_an_input_of_weight_zero_is_skipped_and_never_read(tmp_path: Path) -> None:
    states = three(tmp_path)
    inputs = opened(tmp_path)
    weights = tmp_path / "step1" / "model.safetensors"
    stamp = weights.stat()
    start = min(t.pieces[0].start for t in inputs.layouts[1].tensors.values())
    weights.write_bytes(weights.read_bytes()[:start] + b"\xff" * (stamp.st_size - start))  # NaN
    merged = merge_to_memory(inputs, (0.25, 0.0, 0.75))
    for name, values in merged.items():
        expected = reference([states[0][name], states[2][name]], (0.25, 0.75))
        assert bits(values) == bits(expected), name


def test_a_zero_weight_does_not_turn_negative_zero_into_zero(tmp_path: Path) -> None:
    negative = {"w": torch.tensor([-0.0, 0.0, -1.0])}
    write_checkpoint(tmp_path / "step0", negative)
    write_checkpoint(tmp_path / "step1", {"w": torch.tensor([1.0, 2.0, 3.0])})
    inputs = opened(tmp_path, 2)
    assert bits(merge_to_memory(inputs, (1.0, 0.0))["w"]) == bits(negative["w"])
    beside_another, _ = gather(tmp_path, inputs, [(1.0, 0.0), (0.5, 0.5)])
    assert beside_another["w"] == bits(negative["w"])


def test_an_input_that_is_written_again_during_the_pass_is_told_at_its_end(tmp_path: Path) -> None:
    three(tmp_path)
    merging = passes.Pass(opened(tmp_path), [WEIGHTS])
    with pytest.raises(ChangedCheckpoint, match="step1"), merging:
        make_older(tmp_path / "step1", 50)


def test_what_gives_the_copied_tensors_is_watched_though_it_has_no_weight(tmp_path: Path) -> None:
    three(tmp_path)
    inputs = opened(tmp_path)
    inputs = Inputs(inputs.layouts[:2], inputs.layouts[2])
    with pytest.raises(ChangedCheckpoint, match="step2"), passes.Pass(inputs, [(0.5, 0.5)]):
        make_older(tmp_path / "step2", 50)


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
from ckptfuse.merge.memory import merge_to_memory
merged = merge_to_memory(opened(Path(sys.argv[1])), WEIGHTS)
print(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
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
    said = subprocess.run(
        [sys.executable, "-c", _IN_A_PROCESS, str(tmp_path), "2"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert said == ["2", "DEFAULT", here]


def test_sharded_inputs_merge_to_the_same_tensors_as_single_files(tmp_path: Path) -> None:
    three(tmp_path / "single")
    three(tmp_path / "sharded", shards=3)
    single = merge_to_memory(opened(tmp_path / "single"), WEIGHTS)
    sharded = merge_to_memory(opened(tmp_path / "sharded"), WEIGHTS)
    assert {k: bits(v) for k, v in single.items()} == {k: bits(v) for k, v in sharded.items()}


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


def test_equal_configurations_are_equal_whatever_floats_they_hold(tmp_path: Path) -> None:
    config = {**CONFIG, "time_step_limit": [0.0, math.inf], "epsilon": math.nan}
    for step in range(2):
        write_checkpoint(tmp_path / f"step{step}", {"w": torch.ones(4)}, config=config)
    folders = [open_checkpoint(str(tmp_path / f"step{step}")) for step in range(2)]
    inputs = open_inputs(folders, folders[-1], Recipe())
    identity = config_identity(inputs.ancillary.config)
    assert digest(identity) != digest({**identity, "epsilon": "inf"})


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


def test_an_overflow_of_the_output_dtype_is_no_checkpoints_fault(tmp_path: Path) -> None:
    for step in range(2):
        write_checkpoint(tmp_path / f"step{step}", {"w": torch.tensor([1.0, 1e6])})
    with pytest.raises(NonFiniteValues, match=r"'w'.*float16.*wider output dtype") as caught:
        merge_to_memory(opened(tmp_path, 2, dtype="float16"), (0.5, 0.5))
    assert caught.value.checkpoint == ""


def test_of_neighbours_the_one_that_overflows_is_named(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, 1e6]), "c": torch.ones(5)}
    write_checkpoint(tmp_path / "step0", tensors)
    with pytest.raises(NonFiniteValues, match=r"tensor 'b': the merge overflows"):
        merge_to_memory(opened(tmp_path, 1, dtype="float16"), (1.0,))


@pytest.mark.filterwarnings("error")
def test_sums_that_overflow_are_told_without_a_warning(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step0", {"w": torch.tensor([3e38])})
    with pytest.raises(NonFiniteValues, match="'w'"):
        merge_to_memory(opened(tmp_path, 1), (2.0,))


def test_a_form_to_resume_from_needs_distributed_checkpoints(tmp_path: Path) -> None:
    three(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path / "step0"))
    with pytest.raises(ConfigurationError, match="step0 is no distributed checkpoint"):
        open_inputs([checkpoint], checkpoint, Recipe(form="dcp"))


def test_weights_must_fit_the_inputs_and_be_usable(tmp_path: Path) -> None:
    three(tmp_path)
    with pytest.raises(ConfigurationError, match="2 weights for 3 inputs"):
        merge_to_memory(opened(tmp_path), (0.5, 0.5))
    for weights in ([0.0, 0.0], [float("nan"), 1.0], [float("inf")]):
        with pytest.raises(ConfigurationError, match="weights"):
            check_weights(weights)
    with pytest.raises(ConfigurationError, match="nothing to merge"):
        open_inputs([], opened(tmp_path).ancillary.checkpoint)


def test_floats_that_no_gradient_moves_are_copied_by_name(tmp_path: Path) -> None:
    names = ("layers.0.mlp.gate.e_score_correction_bias", "a.moe.expert_bias", "rope.inv_freq")
    for step in range(2):
        values = {name: torch.tensor([0.5 + step]) for name in (*names, "usual.bias", "w.scale")}
        write_checkpoint(tmp_path / f"step{step}", values)
    checkpoints = [open_checkpoint(str(tmp_path / f"step{step}")) for step in range(2)]
    merged = merge_to_memory(open_inputs(checkpoints, checkpoints[-1]), (0.5, 0.5))
    assert {name: merged[name].item() for name in names} == dict.fromkeys(names, 1.5)
    assert (merged["usual.bias"].item(), merged["w.scale"].item()) == (1.0, 1.0)
    recipe = Recipe(copied=("*.scale",))
    more = merge_to_memory(open_inputs(checkpoints, checkpoints[-1], recipe), (0.5, 0.5))
    assert (more["usual.bias"].item(), more["w.scale"].item()) == (1.0, 1.5)


def test_strict_refuses_copied_tensors_that_differ(tmp_path: Path) -> None:
    for step in range(2):
        values = {"w": torch.tensor([float(step)]), "n": torch.tensor([step, 4])}
        write_checkpoint(tmp_path / f"step{step}", values)
    checkpoints = [open_checkpoint(str(tmp_path / f"step{step}")) for step in range(2)]
    inputs = open_inputs(checkpoints, checkpoints[-1], Recipe(strict=True))
    with pytest.raises(MismatchedCheckpoints, match=r"'n'.*step0"):
        merge_to_memory(inputs, (0.5, 0.5))
    same = open_inputs(checkpoints[1:], checkpoints[-1], Recipe(strict=True))
    assert merge_to_memory(same, (1.0,))["n"].tolist() == [1, 4]


def test_scaled_tensors_may_be_copied_if_that_is_asked_for(tmp_path: Path) -> None:
    for step in range(2):
        values = {"w": torch.ones(2), "q": torch.full((2,), step + 1.0).to(torch.float8_e4m3fn)}
        write_checkpoint(tmp_path / f"step{step}", values)
    checkpoints = [open_checkpoint(str(tmp_path / f"step{step}")) for step in range(2)]
    inputs = open_inputs(checkpoints, checkpoints[-1], Recipe(copied=("q",)))
    (contents,) = merge_to_stores(inputs, [(0.5, 0.5)], [FolderStore(tmp_path / "out")])
    assert contents
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["q"].float().tolist() == [2.0, 2.0]
