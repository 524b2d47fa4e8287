"""Distributed checkpoints under the names that Megatron's torch_dist gives: which tensor is what.

Written by torch's own writer, with names as megatron/core/dist_checkpointing and
megatron/core/optimizer make them: layers stacked, objects under NAME/shard_INDEX_OF, and
``chained_N.`` before each optimizer where there are several, as for Mixture-of-Experts.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.errors import MismatchedCheckpoints
from ckptfuse.layouts import read_layout
from tests.helpers import bits, make_older
from tests.unit.test_dcp import expected, loaded, merged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LAYERS = "decoder.layers.mlp.linear_fc1.weight"
MODEL = {LAYERS, "embedding.word_embeddings.weight", "decoder.layers.mlp.router.expert_bias"}
GROUP = "optimizer.distributed.dp_group_idx_0"
BUCKET = f"{GROUP}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0"
#: The optimizer's tensors in both ways to cut them: as the weights are, and in flat buckets.
KINDS = {
    "as the weights": (f"optimizer.state.fp32_param.{LAYERS}", f"optimizer.state.exp_avg.{LAYERS}"),
    "in buckets": (f"{BUCKET}.param", f"{BUCKET}.exp_avg"),
}


def written(folder: Path, prefix: str, kind: str, **more: object) -> list[Path]:
    """Two checkpoints, two layers each."""
    paths = [folder / f"iter_000000{step}" for step in (1, 2)]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        masters, moments, embedding = torch.randn(3, 2, 5, 4, generator=generator).unbind()
        shape = (40,) if kind == "in buckets" else (2, 5, 4)
        names = [prefix + name for name in KINDS[kind]]
        state: dict[str, object] = {
            LAYERS: masters.bfloat16(),
            "embedding.word_embeddings.weight": embedding[0].bfloat16(),
            "decoder.layers.mlp.router.expert_bias": torch.randn(2, 5, generator=generator),
            "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": b"opaque",
            "rng_state/shard_0.0_1.1": [seed],
            f"{prefix}{GROUP}.optimizer/shard_0_1": {"param_groups": [{"step": seed}]},
            names[0]: masters.reshape(shape),
            names[1]: moments.reshape(shape),
            **{f"{prefix}{name}": value for name, value in more.items()},
        }
        dcp.save(state, checkpoint_id=path, no_dist=True)
        make_older(path, 3600)
    return paths


@pytest.mark.parametrize("prefix", ["", "chained_1."])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_fp32_weights_are_merged_and_the_rest_is_the_newests(
    tmp_path: Path, prefix: str, kind: str
) -> None:
    paths = written(tmp_path, prefix, kind)
    assert read_layout(open_checkpoint(str(paths[0]))).tensors.keys() == MODEL
    out, newest = loaded(merged(paths, tmp_path / "out", form="dcp")), loaded(paths[1])
    masters, moments = (prefix + name for name in KINDS[kind])
    for name in (LAYERS, "embedding.word_embeddings.weight", masters):
        assert bits(out[name]) == bits(expected(paths, name)), name
    for name in ("decoder.layers.mlp.router.expert_bias", moments):
        assert bits(out[name]) == bits(newest[name]), name
    without = loaded(merged(paths, tmp_path / "none", form="dcp", optimizer="none"))
    assert without.keys() == MODEL


@pytest.mark.parametrize("prefix", ["", "chained_0."])
def test_fp32_weights_in_an_object_are_refused_unless_the_optimizer_is_left_out(
    tmp_path: Path, prefix: str
) -> None:
    """As Megatron's sharding dp_zero_gather_scatter keeps them: pickled whole, out of reach."""
    state = {f"{GROUP}.param_state/shard_0_1": {"param": torch.ones(40)}}
    paths = written(tmp_path, prefix, "as the weights", **state)
    with pytest.raises(MismatchedCheckpoints, match=r"param_state.*--optimizer none"):
        merged(paths, tmp_path / "out", form="dcp")
    merged(paths, tmp_path / "out", form="dcp", optimizer="none")
