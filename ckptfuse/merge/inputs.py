"""Checkpoints that can be merged: every header read and compared before a byte of data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ckptfuse.checkpoints import Checkpoint, config_identity
from ckptfuse.errors import ConfigurationError, MismatchedCheckpoints
from ckptfuse.formats.dcp import Entry
from ckptfuse.formats.tensors import BITS, Tensor
from ckptfuse.fusion import Recipe
from ckptfuse.layouts import (
    MASTERS,
    MOMENTS,
    OPAQUE_MASTERS,
    Layout,
    is_optimizer,
    matches,
    model_names,
    optimizer_beside,
    read_layout,
    read_training_state,
)
from ckptfuse.merge.arithmetic import DTYPES

_INTEGERS = frozenset(["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"])
_OUTPUT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

#: Floating tensors that no gradient moves, by name: copied from the newest, as integers are.
COPIED = (
    "*_extra_state*",  # Transformer Engine's, opaque
    "*.expert_bias",  # load balancing of a router: Megatron, torchtitan
    "*.e_score_correction_bias",  # the same: DeepSeek-V3 and what follows it
    "*.tokens_per_expert",  # counters
    "*.local_tokens_per_expert",
    "*.num_batches_tracked",
    "*.inv_freq",  # of rotary positions: a constant
    "*.masked_bias",  # of GPT-2 and GPT-NeoX: a constant
)


@dataclass(frozen=True)
class Inputs:
    """Checkpoints that were checked to fit each other, oldest first.

    ``ancillary`` gives configuration, tokenizer, sharding and the tensors that are copied; it may
    or may not be one of the layouts. ``copied`` are the names of those tensors.
    """

    layouts: tuple[Layout, ...]
    ancillary: Layout
    recipe: Recipe = field(default_factory=Recipe)

    @cached_property
    def copied(self) -> frozenset[str]:
        patterns = (*COPIED, *self.recipe.copied)
        trainers = self._trainers()
        return frozenset(
            name
            for name, tensor in self.ancillary.tensors.items()
            if tensor.dtype in _INTEGERS or name in trainers or matches(name, patterns)
        )

    def _trainers(self) -> set[str]:
        """Of a distributed checkpoint's tensors those that are no weights: copied as they are."""
        if self.recipe.form != "dcp":
            return set()
        entries = [self.ancillary.entries[name] for name in self.ancillary.tensors]
        model = model_names(entries)
        return {e.name for e in entries if e.name not in model and not _is_merged(e, self.recipe)}

    def output_dtype(self, tensor: Tensor) -> str:
        if self.recipe.dtype is not None and tensor.name not in self.copied:
            return _OUTPUT[self.recipe.dtype]
        return tensor.dtype


def open_inputs(
    checkpoints: Sequence[Checkpoint], ancillary: Checkpoint, recipe: Recipe | None = None
) -> Inputs:
    """Read and compare every header before a byte of data.

    Raises MismatchedCheckpoints naming the tensor or configuration key that differs.
    """
    recipe = recipe or Recipe()
    if not checkpoints:
        raise ConfigurationError("nothing to merge: no checkpoint was given")
    read = read_training_state if recipe.form == "dcp" else read_layout
    reference = read(ancillary)
    known = {ancillary.uri: reference}
    layouts = tuple(known.get(c.uri) or read(c) for c in checkpoints)
    if recipe.form == "dcp":
        if recipe.dtype is not None:
            raise ConfigurationError("a distributed checkpoint keeps its dtypes; leave dtype out")
        _check_optimizer(reference, recipe)
        layouts, reference = (
            tuple(_chosen(layout, recipe) for layout in layouts),
            _chosen(reference, recipe),
        )
    for layout in layouts:
        _check_same(layout, reference)
    inputs = Inputs(layouts, reference, recipe)
    for tensor in reference.tensors.values():
        _check_dtype(tensor, inputs)
    return inputs


def _chosen(layout: Layout, recipe: Recipe) -> Layout:
    """Without the optimizer's tensors where they are to be left out."""
    if recipe.optimizer != "none":
        return layout
    entries = {name: e for name, e in layout.entries.items() if not is_optimizer(e)}
    tensors: Mapping[str, Tensor] = {n: t for n, t in layout.tensors.items() if n in entries}
    return replace(layout, tensors=tensors, entries=entries)


def _is_merged(entry: Entry, recipe: Recipe) -> bool:
    """Whether an optimizer's tensor is merged: its fp32 weights are, its moments if asked."""
    if not is_optimizer(entry) or entry.dtype not in DTYPES or not entry.shape:
        return False
    if matches(entry.name, (*MASTERS, *recipe.masters)):
        return True
    return recipe.optimizer == "average" and matches(entry.name, MOMENTS)


def _check_optimizer(reference: Layout, recipe: Recipe) -> None:
    """Refuse an optimizer that may hold weights under a name that we do not know.

    Copied from the newest checkpoint, they would undo the merge at the first step after a resume.
    """
    if recipe.optimizer == "none":
        return
    if recipe.optimizer == "average" and not any(
        is_optimizer(e) and matches(e.name, MOMENTS) for e in reference.entries.values()
    ):
        raise ConfigurationError(
            f"{reference.checkpoint.uri}: no optimizer moments are found to average"
        )
    beside = optimizer_beside(reference.checkpoint)
    for entry in beside.values():
        if matches(entry.name, MASTERS):
            raise MismatchedCheckpoints(
                f"{reference.checkpoint.uri}: {entry.name!r}, in a distributed checkpoint of the "
                "optimizer's own, holds weights that would be copied and, after a resume, undo the "
                "merge; leave the optimizer out with --optimizer none"
            )
    for entry in reference.entries.values():
        if is_optimizer(entry) and matches(entry.name, OPAQUE_MASTERS):
            raise MismatchedCheckpoints(
                f"{reference.checkpoint.uri}: the optimizer's {entry.name!r} is an object that "
                "holds fp32 copies of weights; it would be copied and, after a resume, undo the "
                "merge; leave the optimizer out with --optimizer none"
            )
    known = (*MASTERS, *recipe.masters, *MOMENTS, *COPIED, *recipe.copied)
    for entry in reference.entries.values():
        is_weight_like = entry.dtype in DTYPES and len(entry.shape) > 0 and is_optimizer(entry)
        if is_weight_like and not matches(entry.name, known):
            raise MismatchedCheckpoints(
                f"{reference.checkpoint.uri}: the optimizer's {entry.name!r} is neither a moment "
                "nor an fp32 copy of weights that we know by name. If it holds weights, name it "
                "with --master (a resume would undo the merge otherwise); if not, with --copy"
            )


def _check_dtype(tensor: Tensor, inputs: Inputs) -> None:
    where = inputs.ancillary.checkpoint.uri
    if tensor.name in inputs.copied and BITS[tensor.dtype] >= 8:
        return
    if tensor.name in inputs.copied or tensor.dtype not in DTYPES:
        raise MismatchedCheckpoints(
            f"{where}: tensor {tensor.name!r} is {tensor.dtype}, whose scales this merge does not "
            "know; convert the checkpoints to bfloat16 first"
        )


def _check_same(layout: Layout, reference: Layout) -> None:
    here, there = layout.checkpoint.uri, reference.checkpoint.uri
    if layout.tensors.keys() != reference.tensors.keys():
        only_here = sorted(layout.tensors.keys() - reference.tensors.keys())
        only_there = sorted(reference.tensors.keys() - layout.tensors.keys())
        raise MismatchedCheckpoints(
            f"{here} and {there} hold different tensors: only the first has {only_here[:3]}, only "
            f"the second {only_there[:3]}; checkpoints of one trajectory are needed"
        )
    for name, tensor in layout.tensors.items():
        other = reference.tensors[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            raise MismatchedCheckpoints(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)} in {here} and "
                f"{other.dtype} {list(other.shape)} in {there}; leave one of them out"
            )
    config, expected = config_identity(layout.config), config_identity(reference.config)
    if config != expected:
        keys = config.keys() | expected.keys()
        differing = sorted(key for key in keys if config.get(key) != expected.get(key))
        raise MismatchedCheckpoints(
            f"config.json of {here} and {there} differ in {', '.join(differing)}; a merge across a "
            "change of the architecture or of the training setup is not a model"
        )
