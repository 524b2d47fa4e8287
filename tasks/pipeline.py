"""The ledger's dvc.yaml: the project's own, or one in which DVC has the weights' hashes alone.

versions.weights: cache       DVC's cache holds the merged weights, model/
                  manifest    it holds their hashes, manifest.json: a copy of model/fusion.json
"""

from collections.abc import Mapping
from pathlib import Path

import yaml

from ckptfuse.params import VersionsParams
from tasks.ledger_files import MODEL

MANIFEST = Path("manifest.json")


def template(name: str) -> Path:
    """A file of the ledger's template: inside an installed package, or the project's root."""
    packaged = Path(__file__).parent / "ledger_template" / name
    return packaged if packaged.is_file() else Path(__file__).parent.parent / name


def pipeline(versions: VersionsParams) -> str:
    """The text of dvc.yaml."""
    text = template("dvc.yaml").read_text()
    if versions.weights == "cache":
        return text
    values = yaml.safe_load(text)
    fuse, evaluate = values["stages"]["fuse"], values["stages"]["evaluate"]
    fuse["cmd"] += f" && cp {MODEL}/fusion.json {MANIFEST}"
    fuse["outs"] = [str(MANIFEST)]
    evaluate["deps"] = [str(MANIFEST) if d == str(MODEL) else d for d in evaluate["deps"]]
    return yaml.safe_dump(values, sort_keys=False)


def weights_of(outputs: Mapping[str, str]) -> tuple[str, str]:
    """Path and DVC's hash of what stands for the weights among a commit's outputs."""
    path = str(MANIFEST if str(MANIFEST) in outputs else MODEL)
    return path, outputs[path]
