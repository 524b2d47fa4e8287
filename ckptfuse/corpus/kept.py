"""A corpus that is read once for each version of its files, and kept as what was drawn from them.

``FOLDER/<files, versions and parameters>/``: ``NAME.jsonl`` for each domain and ``about.json``. All
of it can be made again at any time.
"""

import json
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from ckptfuse.corpus.documents import jsonl
from ckptfuse.corpus.draw import DRAW, Corpus, Progress, Source, read_corpus
from ckptfuse.corpus.files import find_files
from ckptfuse.digests import digest
from ckptfuse.new_folder import new_folder
from ckptfuse.params import CorpusParams
from ckptfuse.store import FolderStore

#: Names the form of what is kept, so that no release misreads what another has left.
_FORM = "kept-2"


class KeptCorpus:
    """The corpus of ``params``, read when it is first asked for and then the same for good.

    Every property raises CorpusError and StoreError, as `read_corpus` does.
    """

    def __init__(self, params: CorpusParams, folder: Path) -> None:
        self._params = params
        self._root = folder
        self._read: Progress = lambda size, of: None

    def prepare(self, read: Progress) -> None:
        """Read the files now, if need be; ``read`` is told how it goes on, as by `read_corpus`."""
        self._read = read
        _ = self.digest

    @cached_property
    def corpus(self) -> Corpus:
        folder = self._folder
        if not (folder / "about.json").is_file():
            drawn = read_corpus(self._params, read=self._read)
            _keep(drawn, folder)
            return drawn
        about = json.loads((folder / "about.json").read_text())
        sources = {name: Source(**values) for name, values in about["sources"].items()}
        return replace(read_corpus(self._of_kept(folder)), sources=sources)

    @cached_property
    def digest(self) -> str:
        """The corpus's digest; for known versions of the files no text is read."""
        about = self._folder / "about.json"
        if about.is_file():
            return str(json.loads(about.read_text())["digest"])
        return self.corpus.digest

    @cached_property
    def _folder(self) -> Path:
        domains = {}
        for name, domain in self._params.domains.items():
            found = [[f.uri, f.entry.size, f.entry.version] for f in find_files(domain.path)]
            domains[name] = [domain.field, self._params.budget(name).model_dump(), found]
        decides = self._params.model_dump(mode="json", exclude={"domains"})
        return self._root / digest([_FORM, DRAW, domains, decides])

    def _of_kept(self, folder: Path) -> CorpusParams:
        domains = {
            name: domain.model_copy(update={"path": str(folder / f"{name}.jsonl"), "field": "text"})
            for name, domain in self._params.domains.items()
        }
        return self._params.model_copy(update={"domains": domains})


def _keep(corpus: Corpus, folder: Path) -> None:
    """Write a corpus to ``folder``, which appears whole or not at all."""
    with new_folder(folder, last="about.json") as new:
        store = FolderStore(new)
        for name, documents in corpus.domains.items():
            store.write(f"{name}.jsonl", jsonl(documents))
        sources = {name: asdict(source) for name, source in corpus.sources.items()}
        about = {"digest": corpus.digest, "sources": sources}
        store.write("about.json", json.dumps(about).encode())
