"""The engine alone, in a process of its own: ``merge_engine.py OUT COUNT CHECKPOINT ...``.

Merges uniformly and with COUNT - 1 other weight vectors in one pass; prints JSON.
"""

import json
import sys
import time
from pathlib import Path

from ckptfuse.checkpoints import open_checkpoint
from ckptfuse.merge.folder import merge_to_stores
from ckptfuse.merge.inputs import open_inputs
from ckptfuse.peak import peak_memory
from ckptfuse.store import FolderStore


def main(out: str, count: str, *uris: str) -> None:
    before = peak_memory()
    started = time.perf_counter()
    opened = [open_checkpoint(uri) for uri in uris]
    inputs = open_inputs(opened, opened[-1])
    shares = [[1.0 + v * i for i in range(len(uris))] for v in range(int(count))]
    vectors = [[value / sum(share) for value in share] for share in shares]
    merge_to_stores(inputs, vectors, [FolderStore(Path(out, str(v))) for v in range(int(count))])
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "above_baseline_mib": (peak_memory() - before) / 2**20}))


if __name__ == "__main__":
    main(*sys.argv[1:])
