"""A merge as files: the weight files of many merges in one pass, and a whole model folder.

A folder is written beside its place under a name of its own, file by file, each synced before it
has its name, and renamed when it is whole. What an interrupted merge wrote is taken up again: a
``.merged.json.FILE`` there says that a file is done, and of which fusion it is. On S3 the files go
to their places, and what makes a model of them (config.json, or a distributed checkpoint's
.metadata) comes last.
"""

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from ckptfuse.checkpoints import ANCILLARY_FILES, CONFIG, INDEX, METADATA, Contents
from ckptfuse.digests import LEAF_SIZE, content_digest, leaf_digest, tree_digest
from ckptfuse.errors import ConfigurationError, MissingFile, StoreError
from ckptfuse.fusion import FusionSpec
from ckptfuse.layouts import is_optimizer
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.output_files import output_files, weight_index
from ckptfuse.merge.passes import Pass, Progress, ignore
from ckptfuse.store import FolderStore, Store, remove_folder

#: What an unfinished merge has done; gone once it is whole.
JOURNAL = ".merged.json"


def merge_to_stores(
    inputs: Inputs,
    vectors: Sequence[Sequence[float]],
    stores: Sequence[Store],
    progress: Progress = ignore,
    *,
    only: Collection[str] | None = None,
    finished: Callable[[str, list[Contents]], None] = lambda *_: None,
) -> list[Contents]:
    """Write the weight files of one merge per vector into its store, all in one pass.

    ``only`` names the files to write; each is independent of the others. ``finished`` is told of
    each when it is there. Returns each output's files: path -> (size, content hash).
    """
    contents: list[Contents] = [{} for _ in vectors]
    with Pass(inputs, vectors, only=only) as merging:
        for file in merging.files:
            with ExitStack() as stack:
                outputs = [
                    stack.enter_context(store.part_writer(file.name, file.size, LEAF_SIZE))
                    for store in stores
                ]
                hashes = merging.merge_file(file, outputs, progress)
            for files, content in zip(contents, hashes, strict=True):
                files[file.name] = (file.size, content)
            finished(file.name, contents)
    return contents


def merge_shard(
    inputs: Inputs, spec: FusionSpec, target: Store, shard: int, count: int
) -> Contents:
    """Write shard ``shard`` of ``count`` (from 0): every count-th weight file of a merge.

    Shards are independent, so that workers can share a merge; ``write_fusion`` into the same place
    then finds them done and adds the rest.
    """
    if not 0 <= shard < count:
        raise ConfigurationError(f"shard {shard} of {count}: 0 to {count - 1} are expected")
    names = [file.name for file in output_files(inputs)][shard::count]
    return _merge_missing(inputs, spec, _unfinished(target, spec), ignore, only=names)


def write_fusion(
    inputs: Inputs,
    spec: FusionSpec,
    target: Store,
    progress: Progress = ignore,
) -> Contents:
    """Write a whole model folder: shards, index, ancillary files, fusion.json and model card.

    In a folder store it appears by one rename; on S3 config.json (or .metadata) comes last,
    without which no reader takes the prefix for a model. Returns path -> (size, content hash).
    """
    place = _unfinished(target, spec)
    try:
        contents = _merge_missing(inputs, spec, place, progress)
        contents |= _write_rest(inputs, spec, place)
        for path in _journals(place):
            place.delete(path)
        if isinstance(target, FolderStore):
            assert isinstance(place, FolderStore)
            _rename(place.root, target.root)
    except StoreError:
        raise  # what is done stays for the next try
    except Exception:
        if isinstance(place, FolderStore):
            remove_folder(place.root)
        raise
    return contents


def unfinished_folder(target: Path, fusion: str) -> Path:
    """Where a folder's files are while it is not whole."""
    return target.with_name(f".{target.name}-{fusion[:16]}")


def _unfinished(target: Store, spec: FusionSpec) -> Store:
    if isinstance(target, FolderStore):
        return FolderStore(unfinished_folder(target.root, spec.id))
    return target


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError as error:
        raise ConfigurationError(f"{target} is there already; choose another place") from error


def _merge_missing(
    inputs: Inputs,
    spec: FusionSpec,
    place: Store,
    progress: Progress,
    *,
    only: Collection[str] | None = None,
) -> Contents:
    """The weight files that no earlier try has finished; all of them, one pass."""
    names = [file.name for file in output_files(inputs) if only is None or file.name in only]
    done = _done(place, spec)
    missing = [name for name in names if name not in done]

    def note(name: str, contents: list[Contents]) -> None:
        journal = {"fusion": spec.id, "file": name, "is": contents[0][name]}
        place.write(f"{JOURNAL}.{name.replace('/', '.')}", json.dumps(journal).encode())

    if missing:
        (made,) = merge_to_stores(
            inputs, [spec.weights], [place], progress, only=missing, finished=note
        )
        done |= made
    return {name: done[name] for name in names}


def _journals(place: Store) -> list[str]:
    return [entry.path for entry in place.list() if entry.path.startswith(JOURNAL)]


def is_unfinished(place: Store, spec: FusionSpec) -> bool:
    """Whether what is there are files of an earlier try at the same fusion."""
    return bool(_done(place, spec))


def _done(place: Store, spec: FusionSpec) -> Contents:
    """Files that an earlier try finished: in the journal, and there at their size."""
    done: Contents = {}
    if isinstance(place, FolderStore) and not place.root.is_dir():
        return done
    for path in _journals(place):
        about = json.loads(place.read(path))
        try:
            present = place.stat(about["file"])
        except MissingFile:
            continue
        size, content = about["is"]
        if about["fusion"] == spec.id and present.size == size:
            done[about["file"]] = (size, content)
    return done


def _write_rest(inputs: Inputs, spec: FusionSpec, target: Store) -> Contents:
    small = {"fusion.json": spec.provenance(), "README.md": spec.model_card()}
    if inputs.recipe.form == "dcp":
        contents = _copy_rest(inputs, target)
        small |= _metadata(inputs)
    else:
        contents = {}
        small |= _ancillary_files(inputs)
    for path in sorted(small, key=lambda path: (_comes_last(path), path)):
        target.write(path, small[path])
        contents[path] = (len(small[path]), content_digest(small[path]))
    return contents


def _comes_last(path: str) -> bool:
    return path == CONFIG or path.rpartition("/")[2] == METADATA


def _ancillary_files(inputs: Inputs) -> dict[str, bytes]:
    """Configuration, tokenizer and index of a Hugging Face folder."""
    newest = inputs.ancillary.checkpoint
    source = newest.store()
    wanted = ANCILLARY_FILES | {INDEX}
    small = {e.path: source.read(e.path) for e in newest.files if e.path in wanted}
    if CONFIG not in small:
        raise ConfigurationError(
            f"{newest.uri} has no {CONFIG}, which a Hugging Face folder needs; put the model's "
            "configuration there, or keep the form of the inputs (--form dcp)"
        )
    if inputs.recipe.dtype is not None:
        small[CONFIG] = _with_dtype(small[CONFIG], inputs.recipe.dtype)
    if INDEX not in small or inputs.recipe.dtype is not None:
        index = weight_index(output_files(inputs))
        if index is not None:
            small[INDEX] = index
    return small


def _with_dtype(config: bytes, dtype: str) -> bytes:
    values = json.loads(config)
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    return (json.dumps({**values, key: dtype}, indent=2, sort_keys=True) + "\n").encode()


def _copy_rest(inputs: Inputs, target: Store) -> Contents:
    """Whatever else lies beside a distributed checkpoint: a resume may need it."""
    newest = inputs.ancillary.checkpoint
    source = newest.store()
    taken = set(inputs.ancillary.item_files)
    contents: Contents = {}
    for entry in newest.files:
        name = entry.path.rpartition("/")[2]
        left_out = inputs.recipe.optimizer == "none" and (
            entry.path.startswith("optim") or name.endswith(".distcp")
        )
        if entry.path not in taken and not _comes_last(entry.path) and not left_out:
            contents[entry.path] = _copy(source, target, entry.path, entry.size)
    return contents


def _copy(source: Store, target: Store, path: str, size: int) -> tuple[int, str]:
    leaves = []
    with source.reader(path) as reader, target.writer(path) as out:
        for start in range(0, size, LEAF_SIZE):
            data = bytearray(min(LEAF_SIZE, size - start))
            reader.read_into(start, memoryview(data))
            leaves.append(leaf_digest(data))
            out.write(data)
    return size, tree_digest(leaves)


def _metadata(inputs: Inputs) -> dict[str, bytes]:
    """The newest's .metadata as it is, or for the items that are left; and its config.json."""
    newest = inputs.ancillary.checkpoint
    source = newest.store()
    last = [entry.path for entry in newest.files if _comes_last(entry.path)]
    small = {path: source.read(path) for path in last}
    if inputs.recipe.optimizer != "none":
        return small
    from ckptfuse.formats.dcp_metadata import encode_metadata

    kept = [entry for entry in inputs.ancillary.entries.values() if not is_optimizer(entry)]
    starts = {
        (segment.file, segment.file_start): segment.start
        for file in output_files(inputs)
        for segment in file.segments
    }
    mine = [p for p in last if p.rpartition("/")[2] == METADATA and not p.startswith("optim")]
    dropped = [p for p in last if p.startswith("optim")]
    small |= dict.fromkeys(mine, encode_metadata(kept, starts))
    return {path: data for path, data in small.items() if path not in dropped}
