"""A merge as files: the weight files of many merges in one pass, and a whole model folder.

A folder is written beside its place under a name of its own, file by file, each synced before it
has its name, and renamed when it is whole. What an interrupted merge wrote is taken up again: a
``.merged.json.FILE`` there says that a file is done, and of which fusion it is. On S3 the files go
to their places, and what makes a model of them (config.json, or a distributed checkpoint's
.metadata) comes last.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckptfuse.checkpoints import Contents, fingerprint
from ckptfuse.digests import LEAF_SIZE
from ckptfuse.errors import ConfigurationError, MissingFile, StoreError
from ckptfuse.fingerprints import contents_of
from ckptfuse.fusion import FusionSpec
from ckptfuse.merge.companions import write_companions
from ckptfuse.merge.hashing import InputHashes
from ckptfuse.merge.inputs import Inputs
from ckptfuse.merge.output_files import output_files
from ckptfuse.merge.passes import Pass
from ckptfuse.merge.tally import Progress, ignore
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
    hashes: InputHashes | None = None,
) -> list[Contents]:
    """Write the weight files of one merge per vector into its store, all in one pass.

    ``only`` names the files to write; each is independent of the others. ``finished`` is told of
    each when it is there; ``hashes`` takes those of the inputs. Returns each output's files:
    path -> (size, content hash).
    """
    contents: list[Contents] = [{} for _ in vectors]
    with Pass(inputs, vectors, only=only, hashes=hashes) as merging:
        for file in merging.files:
            with ExitStack() as stack:
                outputs = [
                    stack.enter_context(store.part_writer(file.name, file.size, LEAF_SIZE))
                    for store in stores
                ]
                written = merging.merge_file(file, outputs, progress)
            for files, content in zip(contents, written, strict=True):
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
    work = _Work(inputs, spec.weights, spec.id, target)
    return work.merge_missing(ignore, only=names)


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
    work = _Work(inputs, spec.weights, spec.id, target)
    with work.kept_or_removed():
        return work.complete(spec, work.merge_missing(progress))


def write_and_identify(
    inputs: Inputs,
    weights: Sequence[float],
    key: str,
    target: Store,
    progress: Progress = ignore,
) -> tuple[FusionSpec, Contents]:
    """The same where no fingerprints are known: the inputs are hashed as they are merged.

    ``key`` names the unfinished merge, so that it can be taken up again.
    """
    work = _Work(inputs, weights, key, target)
    with work.kept_or_removed():
        hashes = InputHashes(inputs.layouts)
        written = work.merge_missing(progress, hashes=hashes)
        spec = _identify(inputs, weights, hashes)
        return spec, work.complete(spec, written)


def _identify(inputs: Inputs, weights: Sequence[float], hashes: InputHashes) -> FusionSpec:
    """Fingerprints from what the pass hashed, and a read of the files that it did not."""
    prints: dict[str, str] = {}
    for layout, known in zip(inputs.layouts, hashes.contents, strict=True):
        checkpoint = layout.checkpoint
        prints[checkpoint.uri] = fingerprint(contents_of(checkpoint, known))
    ancillary = inputs.ancillary.checkpoint
    if ancillary.uri not in prints:
        prints[ancillary.uri] = fingerprint(contents_of(ancillary))
    fingerprints = tuple(prints[layout.checkpoint.uri] for layout in inputs.layouts)
    return FusionSpec(fingerprints, tuple(weights), prints[ancillary.uri], inputs.recipe)


def unfinished_folder(target: Path, key: str) -> Path:
    """Where a folder's files are while it is not whole."""
    return target.with_name(f".{target.name}-{key[:16]}")


def is_unfinished(place: Store, key: str) -> bool:
    """Whether what is there are files of an earlier try at the same merge."""
    return bool(_done(place, key))


@dataclass(frozen=True, slots=True)
class _Work:
    """A merge on its way into ``target``; ``key`` says which it is."""

    inputs: Inputs
    weights: Sequence[float]
    key: str
    target: Store

    @property
    def place(self) -> Store:
        """Where its files are until it is whole."""
        if isinstance(self.target, FolderStore):
            return FolderStore(unfinished_folder(self.target.root, self.key))
        return self.target

    def merge_missing(
        self,
        progress: Progress,
        *,
        only: Collection[str] | None = None,
        hashes: InputHashes | None = None,
    ) -> Contents:
        """The weight files that no earlier try has finished; all of them, one pass."""
        place = self.place
        names = [f.name for f in output_files(self.inputs) if only is None or f.name in only]
        done = _done(place, self.key)
        missing = [name for name in names if name not in done]

        def note(name: str, contents: list[Contents]) -> None:
            journal = {"merge": self.key, "file": name, "is": contents[0][name]}
            place.write(f"{JOURNAL}.{name.replace('/', '.')}", json.dumps(journal).encode())

        if missing:
            (made,) = merge_to_stores(
                self.inputs, [self.weights], [place], progress,
                only=missing, finished=note, hashes=hashes,
            )  # fmt: skip
            done |= made
        return {name: done[name] for name in names}

    def complete(self, spec: FusionSpec, weights: Contents) -> Contents:
        """What else belongs to the folder; then it appears. Returns all its files."""
        place = self.place
        contents = write_companions(self.inputs, spec, place, weights)
        if isinstance(self.target, FolderStore) and isinstance(place, FolderStore):
            _remove_others(place.root, contents)
            appear(place.root, self.target.root)
        else:
            for path in _journals(place):
                place.delete(path)
        return contents

    @contextmanager
    def kept_or_removed(self) -> Iterator[None]:
        """What is done stays for the next try when a store failed; on another error it goes."""
        try:
            yield
        except StoreError:
            raise
        except Exception:
            place = self.place
            if isinstance(place, FolderStore):
                remove_folder(place.root)
            else:
                for path in [*_done(place, self.key), *_journals(place)]:
                    place.delete(path)
            raise


def _remove_others(folder: Path, contents: Contents) -> None:
    """Journals, and temporary files of a try that was killed: they would be part of the model."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in contents:
            path.unlink()


def appear(temporary: Path, target: Path) -> None:
    """Give a folder that is whole its name."""
    try:
        temporary.rename(target)
    except OSError as error:
        raise ConfigurationError(f"{target} is there already; choose another place") from error


def _journals(place: Store) -> list[str]:
    return [entry.path for entry in place.list() if entry.path.startswith(JOURNAL)]


def _done(place: Store, key: str) -> Contents:
    """Files that an earlier try finished: in the journal, and there at their size."""
    done: Contents = {}
    if isinstance(place, FolderStore) and not place.root.is_dir():
        return done
    for path in _journals(place):
        try:
            about = json.loads(place.read(path))
        except ValueError:  # a disk that lost what was written: the file is made again
            continue
        try:
            present = place.stat(about["file"])
        except MissingFile:
            continue
        size, content = about["is"]
        if about["merge"] == key and present.size == size:
            done[about["file"]] = (size, content)
    return done
