"""Links through Git and DVC: the tag, its commit, what dvc.lock names, and the cache's bytes."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ckptfuse.digests import digest, file_content
from ckptfuse.merge.companions import PROVENANCE
from ckptfuse.records import CheckpointRecord, ScoreRecord
from ckptfuse.score_files import read_scores
from tasks.chain.evidence import (
    Evidence,
    Gone,
    broken,
    require_contents,
    require_same,
    sizes,
)
from tasks.chain.in_registry import RegistryLinks
from tasks.dvc_cache import DvcCache, md5_of
from tasks.ledger_files import SCORES
from tasks.pipeline import MANIFEST, weights_of
from tasks.version import ledger_of
from tasks.window_file import WindowFile, parse_window_file


class LedgerLinks:
    """Where DVC holds the weights' hashes alone, the weights are those that consumers load."""

    def __init__(self, evidence: Evidence, registered: RegistryLinks) -> None:
        self.evidence = evidence
        self.registered = registered
        self.ledger = ledger_of(evidence.service)
        self.cache = DvcCache(self.ledger)

    @cached_property
    def _commit(self) -> str:
        """As it was published; raises Gone when the ledger was lost since, or begun anew."""
        published = self.evidence.published
        if not self.ledger.is_there:
            raise Gone(f"there is no ledger at {self.ledger.folder} any more")
        has_commit = self.ledger.has(f"{published.commit}^{{commit}}")
        if not has_commit and published.tag not in self.ledger.tags():
            raise Gone(f"the ledger was begun anew, without {published.tag}")
        return published.commit

    def tag(self) -> str:
        """It is where the publication record says."""
        published, commit = self.evidence.published, self._commit
        entry = self.ledger.find(published.tag)
        if entry is None:
            broken(f"the ledger has no tag {published.tag}")
        if entry.commit != commit:
            broken(
                f"the tag {entry.tag} is at commit {entry.commit[:12]}, published was {commit[:12]}"
            )
        return f"{entry.tag} is commit {entry.commit[:12]}"

    def commit(self) -> str:
        """Git's own chain: every object has the name that its bytes give."""
        commit = self._commit
        self.ledger.git("fsck", "--no-dangling", "--no-progress")
        self.ledger.git("merge-base", "--is-ancestor", commit, "main")
        return f"{commit[:12]} is in main, and all Git objects have the names of their bytes"

    def window(self) -> str:
        """window.yaml has the checkpoints, weights and losses of the records."""
        evidence, published = self.evidence, self.evidence.published
        text = self.ledger.git("show", f"{self._commit}:window.yaml")
        pinned = _flat(parse_window_file(text, f"window.yaml at {published.tag}"))
        recorded = _flat(WindowFile.of(evidence.plan, evidence.gate))
        require_same(recorded, pinned, "what window.yaml and the records say")
        for member in evidence.plan.members:
            known = evidence.service.records.get(CheckpointRecord, member.signature)
            if known is None or known.fingerprint != member.fingerprint:
                broken(f"the checkpoint record of {member.name} has not the plan's fingerprint")
        return f"window.yaml pins the plan's {len(evidence.plan.members)} checkpoints and weights"

    def lock(self) -> str:
        """dvc.lock names the weights that were published."""
        published = self.evidence.published
        path, found = weights_of(self.ledger.outputs(self._commit))
        if found != published.weights_hash:
            broken(f"dvc.lock says {found}, published was {published.weights_hash}")
        return f"weights {found} ({path})"

    def cache_holds(self) -> str:
        """Every object that dvc.lock leads to is there and has the hash that it is named by."""
        count = size = 0
        for path, md5 in self._outputs().items():
            for file, expected in {path: md5, **self.cache.files(path, md5)}.items():
                place = self.cache.object(expected)
                if not place.is_file():
                    broken(f"{file} ({expected}) is not in the cache")
                if md5_of(place) != expected.partition(".")[0]:
                    broken(f"{file}: the bytes of {place} have another hash than its name")
                count, size = count + 1, size + place.stat().st_size
        without = "; the weights were deleted by retention" if self.evidence.retired else ""
        return f"{count} objects, {size / 1e6:.1f} MB, have the hashes of their names{without}"

    def _outputs(self) -> dict[str, str]:
        found = self.ledger.outputs(self._commit)
        if self.evidence.retired is not None:
            del found[weights_of(found)[0]]
        return found

    def scores(self) -> str:
        """The losses that decided weights are those of the score records, where these are."""
        records, compared = self.evidence.service.records, 0
        for path, md5 in self._outputs().items():
            if not path.startswith(f"{SCORES}/"):
                continue
            for key, record, arrays in read_scores(self.cache.object(md5)):
                known = records.get(ScoreRecord, key)
                if known is None:
                    continue
                ours = records.arrays(ScoreRecord, key)
                same = all(np.array_equal(ours[name], arrays[name]) for name in arrays)
                if known != record or not same:
                    broken(f"{path}: the score record {key[:16]} ({record.split}) differs")
                compared += 1
        return f"{compared} score records have the losses that the ledger has"

    def provenance(self) -> str:
        """fusion.json fits its id, the plan, the fusion record and the weights beside it."""
        evidence = self.evidence
        evidence.require_weights()
        about, held = self._weights()
        named = {path: (f["size"], f["hash"]) for path, f in about.pop("files").items()}
        fusion = about.pop("fusion")
        del about["weights"], about["content_hash"]
        if not fusion == evidence.published.fusion == digest(about):
            broken(f"fusion.json is of {digest(about)[:12]}, published was {fusion[:12]}")
        used = [[m.fingerprint, m.weight.hex()] for m in evidence.plan.members if m.weight]
        require_same(about, {"inputs": used}, "what fusion.json and the plan say")
        found = {path: file_content(place) for path, place in held.items()}
        require_contents(found, named, "the weights")
        require_contents(found, evidence.fusion.files, "the weights against the fusion record")
        return f"{len(used)} inputs and weights give its id; {sizes(found)} have its hashes"

    def _weights(self) -> tuple[dict[str, Any], dict[str, Path]]:
        """fusion.json as DVC's cache has it, and the files of the weights where they are."""
        md5 = self.evidence.published.weights_hash
        path, _ = weights_of(self.ledger.outputs(self._commit))
        if path == str(MANIFEST):
            return json.loads(self.cache.object(md5).read_bytes()), self.registered.files
        files = self.cache.files(path, md5)
        held = {file.removeprefix(f"{path}/"): self.cache.object(m) for file, m in files.items()}
        return json.loads(held[PROVENANCE].read_bytes()), held


def _flat(window: WindowFile) -> dict[str, object]:
    """Comparable values, without URIs: a bucket may move."""
    values = window.model_dump(mode="json")
    flat: dict[str, object] = {f"fusion.{key}": v for key, v in values["fusion"].items()}
    for name, pinned in values["checkpoints"].items():
        flat |= {f"{name}.{key}": v for key, v in pinned.items() if key != "uri"}
    return flat
