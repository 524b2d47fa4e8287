"""The packaged model: what MLflow loads, around weights that are linked and never copied."""

import json
import os
import tempfile
from pathlib import Path

from ckptfuse.checkpoints import CONFIG
from ckptfuse.errors import PublicationError

#: Where mlflow.transformers expects the weights beside its MLmodel.
MODEL_FOLDER = "model"
#: A call that a consumer can copy: prompts, and what the signature lets one say beside them.
EXAMPLE = (["Once upon a time"], {"max_new_tokens": 16})
#: What a caller may say beside the prompts, with defaults by which the same prompt has one answer.
_GENERATION = (
    ("max_new_tokens", "long", 64),
    ("do_sample", "boolean", False),
    ("temperature", "double", 1.0),
)


def package(model: Path, target: Path) -> None:
    """An MLflow model folder around ``model``'s weights, which are linked and never loaded."""
    import mlflow.transformers
    import torch
    import transformers
    from huggingface_hub import ModelCard
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    weights = {path for path in model.iterdir() if is_weights(path)}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for path in set(model.iterdir()) - weights:
            os.link(path, Path(folder, path.name))
        config = _hide_own_code(Path(folder, CONFIG))
        text = Schema([ColSpec("string")])
        params = ParamSchema([ParamSpec(*item) for item in _GENERATION])
        mlflow.transformers.save_model(
            folder,
            str(target),
            task="text-generation",
            model_card=ModelCard((model / "README.md").read_text()),
            signature=ModelSignature(inputs=text, outputs=text, params=params),
            input_example=EXAMPLE,
            pip_requirements=[
                f"mlflow=={mlflow.__version__}",
                f"torch=={torch.__version__.partition('+')[0]}",
                f"transformers=={transformers.__version__}",
            ],
        )
    if not (target / MODEL_FOLDER / CONFIG).is_file():
        raise PublicationError(f"mlflow.transformers laid no model in {target / MODEL_FOLDER}")
    for path in weights:
        os.link(path, target / MODEL_FOLDER / path.name)
    (target / MODEL_FOLDER / CONFIG).write_bytes(config)
    # MLflow's note that it found no licence, with the path of our temporary folder.
    (target / "LICENSE.txt").unlink(missing_ok=True)
    described = Model.load(str(target))
    described.model_size_bytes = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    described.save(str(target / "MLmodel"))


def _hide_own_code(path: Path) -> bytes:
    """Leave out of a config.json that the model has code of its own; what it was before.

    MLflow loads the tokenizer, and transformers would ask on the terminal whether to run that code.
    """
    whole = path.read_bytes()
    about = json.loads(whole)
    about.pop("auto_map", None)
    path.unlink()  # a hard link of the model's
    path.write_text(json.dumps(about))
    return whole


def is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors"


def library_tags() -> dict[str, str]:
    """The versions of what made and packaged a model, by name."""
    import mlflow
    import safetensors
    import torch
    import transformers

    from ckptfuse import __version__

    libraries = (mlflow, safetensors, torch, transformers)
    versions = {"ckptfuse": __version__, **{m.__name__: m.__version__ for m in libraries}}
    return {"ckptfuse.libraries": ", ".join(f"{n} {v}" for n, v in versions.items())}
