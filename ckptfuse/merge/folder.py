"""A merge as files: the weight files of many merges in one pass, and a whole model folder."""

import json
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ckptfuse.checkpoints import ANCILLARY_FILES, CONFIG, INDEX, Contents
from ckptfuse.digests import LEAF_SIZE, content_digest
from ckptfuse.errors import ConfigurationError
from ckptfuse.formats.safetensors import tensor_bytes
from ckptfuse.fusion import FusionSpec
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.passes import Pass, Progress, ignore
from ckptfuse.store import FolderStore, Store, remove_folder


def merge_to_stores(
    inputs: Inputs,
    vectors: Sequence[Sequence[float]],
    stores: Sequence[Store],
    progress: Progress = ignore,
) -> list[Contents]:
    """Write the weight files of one merge per vector into its store, all in one pass.

    Returns each output's files: path -> (size, content hash).
    """
    contents: list[Contents] = [{} for _ in vectors]
    with Pass(inputs, vectors) as merging:
        for file in merging.files:
            with ExitStack() as stack:
                outputs = [
                    stack.enter_context(store.part_writer(file.name, file.size, LEAF_SIZE))
                    for store in stores
                ]
                hashes = merging.merge_file(file, outputs, progress)
            for files, content in zip(contents, hashes, strict=True):
                files[file.name] = (file.size, content)
    return contents


def write_fusion(
    inputs: Inputs,
    spec: FusionSpec,
    target: Store,
    progress: Progress = ignore,
) -> Contents:
    """Write a whole model folder: shards, index, ancillary files, fusion.json and model card.

    In a folder store it appears by one rename; on S3 config.json comes last, without which no
    reader takes the prefix for a model. Returns path -> (size, content hash).
    """
    if isinstance(target, FolderStore):
        temporary = target.root.with_name(f".{target.root.name}-{uuid.uuid4().hex}")
        try:
            contents = _write_files(inputs, spec, FolderStore(temporary), progress)
            _rename(temporary, target.root)
        finally:
            remove_folder(temporary)
        return contents
    return _write_files(inputs, spec, target, progress)


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError as error:
        raise ConfigurationError(f"{target} is there already; choose another place") from error


def _write_files(inputs: Inputs, spec: FusionSpec, target: Store, progress: Progress) -> Contents:
    (contents,) = merge_to_stores(inputs, [spec.weights], [target], progress)
    small = {"fusion.json": spec.provenance(), "README.md": spec.model_card()}
    source = inputs.ancillary.checkpoint.store()
    for entry in inputs.ancillary.checkpoint.files:
        if entry.path in ANCILLARY_FILES | {INDEX}:
            small[entry.path] = source.read(entry.path)
    if inputs.dtype is not None:
        small[CONFIG] = _with_dtype(small[CONFIG], inputs.dtype)
        if INDEX in small:
            small[INDEX] = _with_total_size(small[INDEX], inputs)
    for path in sorted(small, key=lambda path: (path == CONFIG, path)):
        target.write(path, small[path])
        contents[path] = (len(small[path]), content_digest(small[path]))
    return contents


def _with_dtype(config: bytes, dtype: str) -> bytes:
    values = json.loads(config)
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    return (json.dumps({**values, key: dtype}, indent=2, sort_keys=True) + "\n").encode()


def _with_total_size(index: bytes, inputs: Inputs) -> bytes:
    values = json.loads(index)
    tensors = inputs.ancillary.tensors.values()
    total = sum(tensor_bytes(inputs.output_dtype(t), t.shape) for t in tensors)
    values["metadata"] = {**values.get("metadata", {}), "total_size": total}
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
