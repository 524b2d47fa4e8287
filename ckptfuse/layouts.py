"""What lies in a checkpoint: every tensor's place, read from headers alone, in any format.

Two views of a distributed checkpoint: the model's tensors under their own names, as every other
format holds them (``read_layout``); and all that a trainer resumes from, under the names of the
checkpoint (``read_training_state``).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

from ckptfuse.checkpoints import BIN_INDEX, CONFIG, INDEX, Checkpoint, distributed_metadata
from ckptfuse.digests import digest
from ckptfuse.errors import ConfigurationError, DamagedCheckpoint, MissingFile
from ckptfuse.formats import dcp, safetensors, torch_zip
from ckptfuse.formats.tensors import Tensor, whole_tensor
from ckptfuse.store import Reader, Store

Format = Literal["safetensors", "bin", "dcp"]

#: First keys of a distributed checkpoint's nested state dict, by what lies under them.
_MODEL_KEYS = frozenset(["model", "module", "state_dict", "model_state_dict"])
_OPTIMIZER_KEYS = frozenset(
    ["optim", "optimizer", "optimizers", "optim_state", "optimizer_state", "optimizer_state_dict"]
)
_TRAINER_KEYS = frozenset(
    ["lr_scheduler", "scheduler", "lr_schedulers", "dataloader", "train_state", "trainer", "rng",
     "rng_state", "opt_param_scheduler", "ema", "step", "steps", "epoch", "iteration"]
)  # fmt: skip
#: What Megatron puts before the names of each optimizer where there are several.
_CHAINED = re.compile(r"^chained_\d+\.")
#: What wrappers put before every name.
_WRAPPERS = ("module.", "_orig_mod.")

#: fp32 copies of the weights that an optimizer keeps: Megatron, Transformer Engine, apex.
MASTERS = (
    "*fp32_param*", "*master_param*", "*master_weight*", "*main_param*", "*.master.*", "*.master",
    "*.bucket_idx_*.param",
)  # fmt: skip
#: Objects, opaque to us, in which Megatron's dp_zero_gather_scatter keeps those copies.
OPAQUE_MASTERS = ("*.param_state", "*.param_state/*")
#: Averages of gradients: their names in torch, apex, Megatron, Muon and Lion.
MOMENTS = (
    "*exp_avg*", "*exp_inf*", "*momentum_buffer*", "*momentum*", "*square_avg*", "*grad_avg*",
    "*acc_delta*", "*.sum", "*moment1*", "*moment2*", "*.step", "*.step.*", "*.lr", "*.mu", "*.nu",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One checkpoint's tensors by name, in the order of files and bytes, and its configuration.

    ``free_text`` is the metadata of each safetensors file; ``entries`` all names of a distributed
    checkpoint.
    """

    checkpoint: Checkpoint
    format: Format
    tensors: Mapping[str, Tensor]
    config: Mapping[str, object]
    free_text: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    entries: dcp.Entries = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The files that hold tensors."""
        named = (piece.file for tensor in self.tensors.values() for piece in tensor.pieces)
        return list(dict.fromkeys([*self.free_text, *named]))

    @property
    def item_files(self) -> list[str]:
        """The files of a distributed checkpoint."""
        named = (item.file for entry in self.entries.values() for item in entry.items)
        return list(dict.fromkeys(named))

    @property
    def architecture(self) -> str:
        """Digest of tensor names, dtypes and shapes: equal where checkpoints can be merged."""
        return digest(sorted([t.name, t.dtype, list(t.shape)] for t in self.tensors.values()))


def read_layout(checkpoint: Checkpoint) -> Layout:
    """The model's tensors; raises IncompleteCheckpoint or DamagedCheckpoint."""
    store = checkpoint.store()
    sizes = {entry.path: entry.size for entry in checkpoint.files}
    config = read_config(store)
    metadata = distributed_metadata(entry.path for entry in checkpoint.files)
    if metadata is not None:
        entries = _read_entries(checkpoint, metadata)
        names = model_names(entries.values())
        located = dcp.locate(store, [entries[name] for name in names])
        tensors = {
            names[name]: Tensor(names[name], tensor.dtype, tensor.shape, tensor.pieces)
            for name, tensor in located.items()
        }
        return Layout(checkpoint, "dcp", tensors, config, entries=entries)
    if any(path.endswith(".safetensors") for path in sizes):
        layout = _read_safetensors(checkpoint, store, sizes, config)
        index = INDEX
    else:
        layout = _read_bin(checkpoint, store, sizes, config)
        index = BIN_INDEX
    if index in sizes:
        _check_index(store, index, layout)
    return layout


def read_training_state(checkpoint: Checkpoint) -> Layout:
    """Every tensor of a distributed checkpoint, under the checkpoint's own names.

    Raises ConfigurationError for any other.
    """
    metadata = distributed_metadata(entry.path for entry in checkpoint.files)
    if metadata is None:
        raise ConfigurationError(
            f"{checkpoint.uri} is no distributed checkpoint; a merge in that form is of such alone "
            "(--form safetensors merges the models of both kinds)"
        )
    store = checkpoint.store()
    entries = _read_entries(checkpoint, metadata)
    tensors = dcp.locate(store, entries.values())
    return Layout(checkpoint, "dcp", tensors, read_config(store), entries=entries)


def optimizer_beside(checkpoint: Checkpoint) -> dcp.Entries:
    """What Accelerate's second distributed checkpoint, the optimizer's, holds; often nothing."""
    sizes = {entry.path: entry.size for entry in checkpoint.files}
    model = distributed_metadata(sizes)
    entries: dict[str, dcp.Entry] = {}
    for path in sizes:
        if path != model and path.rpartition("/")[2] == dcp.METADATA:
            entries |= dcp.read_metadata(checkpoint.store(), path, sizes)
    return entries


def _read_entries(checkpoint: Checkpoint, metadata: str) -> dcp.Entries:
    sizes = {entry.path: entry.size for entry in checkpoint.files}
    entries = dcp.read_metadata(checkpoint.store(), metadata, sizes)
    dcp.check_files(entries, sizes, checkpoint.uri)
    return entries


def model_names(entries: Iterable[dcp.Entry]) -> dict[str, str]:
    """Of a distributed checkpoint's names those of the model's tensors, and what they are there."""
    tensors = [entry for entry in entries if entry.dtype is not None]
    nested = [e for e in tensors if len(e.path) > 1 and e.path[0] in _MODEL_KEYS]
    if nested:
        names = {entry.name: ".".join(map(str, entry.path[1:])) for entry in nested}
    else:
        names = {e.name: e.name for e in tensors if not (is_optimizer(e) or _is_trainers(e))}
    for wrapper in _WRAPPERS:
        if names and all(name.startswith(wrapper) for name in names.values()):
            names = {key: name.removeprefix(wrapper) for key, name in names.items()}
    return names


def is_optimizer(entry: dcp.Entry) -> bool:
    return _first_key(entry) in _OPTIMIZER_KEYS


def _is_trainers(entry: dcp.Entry) -> bool:
    return _first_key(entry) in _TRAINER_KEYS


def _first_key(entry: dcp.Entry) -> str:
    key = _CHAINED.sub("", str(entry.path[0]))
    return key.partition(".")[0].partition("/")[0]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of these, in which * stands for any characters."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def read_config(store: Store) -> Mapping[str, object]:
    """The configuration that lies in a checkpoint's folder; empty without one."""
    try:
        config = json.loads(store.read(CONFIG))
    except MissingFile:
        return {}  # a distributed checkpoint has none; of any other it was asked before
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{store.uri}/{CONFIG}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DamagedCheckpoint(f"{store.uri}/{CONFIG}: not a JSON object")
    return config


def _read_safetensors(
    checkpoint: Checkpoint, store: Store, sizes: Mapping[str, int], config: Mapping[str, object]
) -> Layout:
    files = sorted(path for path in sizes if path.endswith(".safetensors"))
    headers = {file: safetensors.read_header(store, file, sizes[file]) for file in files}
    found = [tensor for header in headers.values() for tensor in header.tensors]
    free_text = {file: header.metadata for file, header in headers.items()}
    tensors = _by_name(checkpoint, found)
    return Layout(checkpoint, "safetensors", tensors, config, free_text)


def _read_bin(
    checkpoint: Checkpoint, store: Store, sizes: Mapping[str, int], config: Mapping[str, object]
) -> Layout:
    found: list[Tensor] = []
    for file in sorted(path for path in sizes if path.endswith(".bin")):
        where = f"{store.uri}/{file}"
        with store.reader(file) as reader:
            archive = torch_zip.Archive(partial(_fetch, reader), sizes[file], where)
            stored = torch_zip.state_dict(archive.object(), where)
            placed = [
                whole_tensor(name, tensor.dtype, tensor.shape, file, archive.start_of(tensor))
                for name, tensor in stored.items()
            ]
        found += sorted(placed, key=lambda tensor: (tensor.pieces[0].start, tensor.name))
    return Layout(checkpoint, "bin", _by_name(checkpoint, found), config)


def _fetch(reader: Reader, start: int, length: int) -> bytearray:
    data = bytearray(length)
    reader.read_into(start, memoryview(data))
    return data


def _by_name(checkpoint: Checkpoint, found: list[Tensor]) -> dict[str, Tensor]:
    tensors = {tensor.name: tensor for tensor in found}
    if len(tensors) != len(found):
        raise DamagedCheckpoint(f"{checkpoint.uri}: the same tensor lies in two of its files")
    return tensors


def _check_index(store: Store, index: str, layout: Layout) -> None:
    for name, file in safetensors.read_index(store, index).items():
        if name not in layout.tensors or layout.tensors[name].pieces[0].file != file:
            raise DamagedCheckpoint(
                f"{store.uri}/{index}: names tensor {name!r} in {file}, which does not hold it"
            )
