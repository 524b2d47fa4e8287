"""Scores as files: what a DVC stage passes to the next, one ``.npz`` a model.

It holds, for each split, the score record's JSON and its arrays, so that the records of another
workspace can be filled from it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ckptfuse.corpus import SPLITS
from ckptfuse.errors import RecordError
from ckptfuse.record_files import Arrays, Records
from ckptfuse.records import ScoreRecord
from ckptfuse.scoring import Scorer


def export_scores(scorer: Scorer, model_id: str, tokenizer: str, path: Path) -> None:
    """Write a scored model's records; raises RecordError when a split is missing."""
    arrays: dict[str, Any] = {}
    for split in SPLITS:
        key = scorer.key(model_id, tokenizer, split)
        record = scorer.records.get(ScoreRecord, key)
        if record is None:
            raise RecordError(f"model {model_id[:16]} has no score on the {split} split")
        arrays[f"{split}/key"] = np.array(key)
        arrays[f"{split}/record"] = np.array(record.model_dump_json())
        for name, values in scorer.records.arrays(ScoreRecord, key).items():
            arrays[f"{split}/{name}"] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it may be a read-only link into a cache
    with path.open("wb") as out:
        np.savez_compressed(out, allow_pickle=False, **arrays)


def import_scores(records: Records, path: Path) -> None:
    """Put the records of ``export_scores`` into another records store."""
    for key, record, arrays in read_scores(path):
        records.put(key, record, arrays)


def read_scores(path: Path) -> Iterator[tuple[str, ScoreRecord, Arrays]]:
    """What ``export_scores`` wrote: the key, record and arrays of each split."""
    with np.load(path, allow_pickle=False) as loaded:
        for split in SPLITS:
            record = ScoreRecord.model_validate_json(str(loaded[f"{split}/record"]))
            prefix = f"{split}/"
            arrays = {
                name.removeprefix(prefix): loaded[name]
                for name in loaded.files
                if name.startswith(prefix) and name not in (f"{split}/key", f"{split}/record")
            }
            yield str(loaded[f"{split}/key"]), record, arrays
