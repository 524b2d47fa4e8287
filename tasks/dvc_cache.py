"""The files in DVC's cache, by the hashes that a commit of the ledger names.

An object lies at ``files/md5/<first two digits>/<the rest>``; that of a folder ends in ``.dir``
and is a JSON list of the folder's files with their hashes. The same content is one object, of
whichever commits and folders it is part.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from ckptfuse.errors import PublicationError
from tasks.ledger import Ledger
from tasks.pipeline import weights_of

#: Ends the name of an object that lists the files of a folder.
FOLDER = ".dir"
_READ = 1 << 20


class DvcCache:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def object(self, md5: str) -> Path:
        return self._ledger.cached(md5)

    def files(self, path: str, md5: str) -> dict[str, str]:
        """Path -> hash of an output's files, itself or those of a folder.

        Raises PublicationError when the cache lacks the folder's list.
        """
        if not md5.endswith(FOLDER):
            return {path: md5}
        try:
            listed = json.loads(self.object(md5).read_bytes())
        except (OSError, ValueError) as error:
            raise PublicationError(
                f"the DVC cache cannot tell what is in {path}: {error}"
            ) from error
        return {f"{path}/{item['relpath']}": str(item["md5"]) for item in listed}

    def objects(self, path: str, md5: str) -> set[Path]:
        """All cache files of an output."""
        return {self.object(md5)} | {self.object(m) for m in self.files(path, md5).values()}

    def model(self, tag: str) -> dict[str, Path]:
        """A tag's merged model: path -> where the file is here; empty when it is not here."""
        path, md5 = weights_of(self._ledger.outputs(tag))
        if not md5.endswith(FOLDER) or not self.object(md5).is_file():
            return {}
        found = {
            file.removeprefix(f"{path}/"): self.object(content)
            for file, content in self.files(path, md5).items()
        }
        return found if all(place.is_file() for place in found.values()) else {}

    def only_of(self, tag: str, gone: Collection[str]) -> set[Path]:
        """The cache files of a tag's weights that nothing else needs.

        Needed are all outputs of all tags, less the weights of the tags that are ``gone``, and less
        folders whose list is not here (a ledger was lost, say): whoever brings the list brings the
        files. A tag that is not there has none: its ledger was lost, with the cache in it. Raises
        PublicationError, before anything is deleted, when a list cannot be read.
        """
        tags = self._ledger.tags()
        if tag not in tags:
            return set()
        own = weights_of(self._ledger.outputs(tag))
        if not self.object(own[1]).is_file():
            return set()  # deleted before: the list goes last
        needed = set[Path]()
        for other in tags:
            outputs = self._ledger.outputs(other)
            weights, _ = weights_of(outputs)
            for path, md5 in outputs.items():
                is_gone = path == weights and other in gone
                is_elsewhere = not self.object(md5).is_file()
                if not (is_gone or is_elsewhere):
                    needed |= self.objects(path, md5)
        return self.objects(*own) - needed


def md5_of(path: Path) -> str:
    """DVC's hash of a file: the MD5 of its bytes."""
    found = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_READ):
            found.update(piece)
    return found.hexdigest()
