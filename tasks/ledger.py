"""The ledger: a Git repository with DVC that the service owns, one commit and tag per fusion.

    dvc.yaml params.yaml constraints.txt   how                      in Git
    sources.yaml                           what corpus/ is drawn from  in Git
    window.yaml dvc.lock metrics.json      what came out            in Git
    corpus/ scores/ decision.json model/   text, scores, weights    in DVC

With ``versions.weights: manifest``, manifest.json stands in DVC where model/ does (pipeline.py).

Files that the service computed elsewhere are laid in place and taken over with ``dvc commit``, so
that ``dvc repro`` at the tag finds nothing to do, and makes the same bytes when forced.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from ckptfuse.corpus import jsonl
from ckptfuse.errors import PublicationError
from ckptfuse.merge.companions import PROVENANCE
from ckptfuse.params import LedgerParams
from ckptfuse.passwords import without_passwords
from ckptfuse.records import GateRecord, PlanRecord
from ckptfuse.score_files import export_scores
from ckptfuse.service import Service
from ckptfuse.store import link_tree, open_store, remove_folder
from tasks import ledger_files
from tasks.log import log
from tasks.pipeline import MANIFEST, pipeline, template, weights_of
from tasks.programs import run
from tasks.window_file import WindowFile

_SETTINGS_OF_GIT = (
    "user.name=ckptfuse", "user.email=ckptfuse@localhost", "commit.gpgsign=false",
    "core.hooksPath=/dev/null",
)  # fmt: skip
#: Seconds: for what is small (Git's), and for weights that are hashed or pushed (DVC's).
_PATIENCE, _PATIENCE_WITH_DATA = 600.0, 86400.0
#: What of the ledger Git holds.
_IN_GIT = (
    ".dvc", ".dvcignore", ".gitignore", "dvc.yaml", "dvc.lock", "corpus.dvc", "params.yaml",
    "constraints.txt", "sources.yaml", "window.yaml",
    str(ledger_files.METRICS), str(ledger_files.LOSSES),
)  # fmt: skip
_IGNORED = "/corpus\n/scores\n/decision.json\n/model\n/manifest.json\n"
#: With any other type first DVC copies what it commits, where reflinks are missing.
_SETTINGS = """[cache]
    type = "hardlink,copy"
[core]
    analytics = false
    autostage = false
"""
#: All that `tag_of` names: what a remote lacks of them goes with each push.
_TAGS = "refs/tags/step-*:refs/tags/step-*"
_REMOTE = """    remote = storage
['remote "storage"']
    url = "{url}"
"""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Where one fusion is in the ledger. ``weights_hash`` is DVC's, of model/ or manifest.json."""

    tag: str
    commit: str
    weights_hash: str


def tag_of(decided: PlanRecord) -> str:
    return f"step-{decided.step}-{decided.fusion[:12]}"


class Ledger:
    def __init__(self, folder: Path, *, patience: float = _PATIENCE) -> None:
        """``patience``: seconds that a command of Git's may take, since a remote may hang."""
        self.folder = folder
        self._patience = patience

    # -- programs --------------------------------------------------------------------------

    def git(self, *arguments: str) -> str:
        settings = [part for value in _SETTINGS_OF_GIT for part in ("-c", value)]
        called = f"git {' '.join(arguments)}"
        return run(
            ["git", *settings, *arguments], self.folder, called=called, patience=self._patience
        )

    def dvc(self, *arguments: str) -> str:
        # Its own choice, /var/tmp, may be read-only. What it notes of hashes lies inside of .git,
        # as Git LFS's files do: .dvc is not there before init. And for us alone: DVC would let
        # everyone write in it, and believes what it finds there.
        notes = self.folder / ".git" / "dvc"
        notes.mkdir(mode=0o700, exist_ok=True)
        return run(
            [sys.executable, "-m", "dvc", *arguments],
            self.folder,
            called=f"dvc {' '.join(arguments)}",
            patience=_PATIENCE_WITH_DATA,
            environment={"DVC_SITE_CACHE_DIR": os.environ.get("DVC_SITE_CACHE_DIR", str(notes))},
        )

    @property
    def is_there(self) -> bool:
        return (self.folder / ".git" / "HEAD").is_file()

    # -- the repository --------------------------------------------------------------------

    def prepare(self, remote: str | None) -> None:
        """Make the repository, or bring it back to its last commit after a kill. We own it.

        In a workspace that lost its ledger it goes on from what was pushed to ``remote``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.is_there:
            self.git("init", "--quiet", "--initial-branch=main")
        own = self.folder / ".git"
        for lock in (*own.glob("*.lock"), *(own / "refs").rglob("*.lock")):  # of a killed git
            lock.unlink()
        self.git("symbolic-ref", "HEAD", "refs/heads/main")  # a push may have been at a tag
        if not self.has("HEAD") and remote is not None:
            self._take_over(remote)
        if self.has("HEAD"):
            self.git("reset", "--quiet", "--hard")
        if not self.has("HEAD:.dvc/config"):
            self._first_commit()
        for name in ("lock", "rwlock", "rwlock.lock"):
            (self.folder / ".dvc" / "tmp" / name).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        try:
            self.git("rev-parse", "--verify", "--quiet", name)
        except PublicationError:
            return False
        return True

    def _take_over(self, remote: str) -> None:
        if self.git("ls-remote", "--heads", "--", remote, "main"):
            self.git("fetch", "--quiet", "--tags", "--", remote, "main")
            self.git("update-ref", "refs/heads/main", "FETCH_HEAD")
            known = self.git("tag", "--list").splitlines()
            log.warning(
                "this workspace had no ledger: it goes on from %d fusions at %s",
                len(known),
                without_passwords(remote),
            )

    def _first_commit(self) -> None:
        remove_folder(self.folder / ".dvc")
        self.dvc("init")
        self._configure(None)
        self._add()
        self.git("commit", "--quiet", "--message", "A ledger of fusions")

    def _add(self) -> None:
        """What belongs to a fusion; a file that somebody else put beside it does not."""
        self.git("add", "--all", "--", *(name for name in _IN_GIT if (self.folder / name).exists()))

    def _configure(self, dvc_remote: str | None) -> None:
        """DVC's settings, as files: each of its commands takes a second."""
        remote = _REMOTE.format(url=dvc_remote) if dvc_remote else ""
        (self.folder / ".dvc" / "config").write_text(_SETTINGS + remote)
        (self.folder / ".gitignore").write_text(_IGNORED)

    def tags(self) -> list[str]:
        """None where there is no ledger."""
        return self.git("tag", "--list").split() if self.is_there else []

    def find(self, tag: str) -> LedgerEntry | None:
        """The entry of a tag; None when it was not made yet."""
        if not self.git("tag", "--list", tag):
            return None
        commit = self.git("rev-list", "-n", "1", tag)
        return LedgerEntry(tag, commit, weights_of(self.outputs(commit))[1])

    def outputs(self, commit: str) -> dict[str, str]:
        """What DVC holds of a commit (or tag): path -> DVC's hash."""
        lock = yaml.safe_load(self.git("show", f"{commit}:dvc.lock"))
        corpus = yaml.safe_load(self.git("show", f"{commit}:corpus.dvc"))
        outs = [out for stage in lock["stages"].values() for out in stage["outs"]]
        in_git = {str(ledger_files.METRICS), str(ledger_files.LOSSES)}
        return {
            str(out["path"]): str(out["md5"])
            for out in [*outs, *corpus["outs"]]
            if out["path"] not in in_git
        }

    def cached(self, md5: str) -> Path:
        """The file in DVC's cache with this hash (of a folder: the list of its files)."""
        return self.folder / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]

    # -- one fusion ------------------------------------------------------------------------

    def enter(self, service: Service, decided: PlanRecord, verdict: GateRecord) -> LedgerEntry:
        """Commit and tag a fusion; the entry that is there already when it was."""
        self.prepare(service.params.ledger.remote)
        tag = tag_of(decided)
        known = self.find(tag)
        if known is None or not self.cached(known.weights_hash).is_file():
            self._lay_out(service, decided, verdict)
            self.dvc("commit", "--force")
        if known is None:
            known = self._commit(tag, decided, verdict)
        else:  # of a workspace that was lost; only its data had to be laid beside it
            self.git("reset", "--quiet", "--hard")
        self._push(service.params.ledger, known)
        return known

    def _commit(self, tag: str, decided: PlanRecord, verdict: GateRecord) -> LedgerEntry:
        self._add()
        if self.git("diff", "--cached", "--name-only"):
            message = f"Step {decided.step}: fusion {decided.fusion[:12]}\n\n{verdict.reason}"
            self.git("commit", "--quiet", "--message", message)
        self.git("tag", "--annotate", tag, "--message", verdict.reason)
        made = self.find(tag)
        assert made is not None
        return made

    def _push(self, params: LedgerParams, entry: LedgerEntry) -> None:
        """Data first: a commit that others see is one whose data they can pull."""
        if params.dvc_remote:
            self._push_earlier(params.dvc_remote, entry)
            self._push_data(params.dvc_remote, entry.tag)
        if params.remote:
            self.git("push", "--quiet", "--atomic", params.remote, "main", _TAGS)

    def _push_earlier(self, remote: str, entry: LedgerEntry) -> None:
        """The data of fusions that were published before there was this remote."""
        known = {*self._pushed().get(remote, ()), entry.tag}
        late = [t for t in self.tags() if t not in known and self.has(f"{t}:dvc.lock")]
        if late:
            log.info("the data of %d earlier fusions is pushed to %s too", len(late), remote)
        try:
            for tag in late:
                self._push_data(remote, tag)
        except PublicationError as error:  # of an earlier one, which holds up no other
            log.warning("it goes on with the next publication: %s", error)

    def _push_data(self, remote: str, tag: str) -> None:
        """Push what DVC holds of a fusion, and remember that: DVC asks for each file anew."""
        if self.git("rev-parse", "HEAD") != self.git("rev-list", "-n", "1", tag):
            self.git("checkout", "--quiet", "--force", "--detach", tag)  # it pushes only this
        self._configure(remote)
        self.dvc("push")
        pushed = self._pushed()
        pushed[remote] = sorted({*pushed.get(remote, ()), tag})
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        self._memory.write_text(json.dumps(pushed))

    def _pushed(self) -> dict[str, list[str]]:
        """DVC remote -> tags whose data is there; where that is forgotten, all is pushed again."""
        try:
            found: dict[str, list[str]] = json.loads(self._memory.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    @property
    def _memory(self) -> Path:
        return self.folder / ".dvc" / "tmp" / "pushed.json"

    def _lay_out(self, service: Service, decided: PlanRecord, verdict: GateRecord) -> None:
        (self.folder / "dvc.yaml").write_text(pipeline(service.params.versions))
        (self.folder / "constraints.txt").write_bytes(template("constraints.txt").read_bytes())
        self._configure(service.params.ledger.dvc_remote)
        WindowFile.of(decided, verdict).write(self.folder)  # dvc.yaml does not parse without it
        self._lay_corpus(service)
        remove_folder(self.folder / "scores")
        for member in decided.members:
            path = self.folder / ledger_files.SCORES / f"step{member.step}.npz"
            export_scores(service.scorer, member.fingerprint, decided.tokenizer, path)
        ledger_files.write_decision(decided, self.folder)
        ledger_files.write_metrics(service, decided, verdict, self.folder)
        made = service.workspace.model(decided.fusion)
        self._lay_weights(made, in_cache=service.params.versions.weights == "cache")

    def _lay_weights(self, made: Path, *, in_cache: bool) -> None:
        remove_folder(self.folder / ledger_files.MODEL)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        if in_cache:
            link_tree(made, self.folder / ledger_files.MODEL)
        else:
            shutil.copyfile(made / PROVENANCE, self.folder / MANIFEST)

    def _lay_corpus(self, service: Service) -> None:
        """The documents drawn, and the scientific parameters with their paths in the ledger.

        Drawn from again they are the same corpus, so the files they came from can be of any size,
        form and place; ``sources.yaml`` names them.
        """
        corpus, params = service.scorer.corpus(), service.params
        science = params.scientific()
        files = {f"{name}.jsonl": jsonl(drawn) for name, drawn in corpus.domains.items()}
        for name in params.corpus.domains:
            science["corpus"]["domains"][name] |= {"path": f"corpus/{name}.jsonl", "field": "text"}
        if params.corpus.tokenizer:
            store = open_store(params.corpus.tokenizer)
            files |= {f"tokenizer/{e.path}": store.read(e.path) for e in store.list("")}
            science["corpus"]["tokenizer"] = "corpus/tokenizer"
        self._write_yaml("params.yaml", science)
        self._write_yaml("sources.yaml", {n: asdict(s) for n, s in corpus.sources.items()})
        if self._replace_changed(files):
            self.dvc("add", "corpus")

    def _write_yaml(self, name: str, values: object) -> None:
        (self.folder / name).write_text(yaml.safe_dump(values, sort_keys=False))

    def _replace_changed(self, files: Mapping[str, bytes]) -> bool:
        """Write the corpus anew unless every file in place has its content already."""
        corpus = self.folder / "corpus"
        present = {p.relative_to(corpus).as_posix() for p in corpus.rglob("*") if p.is_file()}
        same = present == files.keys() and all(
            (corpus / name).read_bytes() == data for name, data in files.items()
        )
        if same and (self.folder / "corpus.dvc").is_file():
            return False
        remove_folder(corpus)
        for name, data in files.items():
            path = corpus / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return True
