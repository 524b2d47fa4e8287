"""The packaged model: what MLflow loads, around weights that are linked and never copied."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from ckptfuse.checkpoints import CONFIG, is_ancillary
from ckptfuse.errors import PublicationError
from ckptfuse.own_code import tokenizer_class

#: Where mlflow.transformers expects the weights beside its MLmodel, and the tokenizer.
MODEL_FOLDER = "model"
_TOKENIZER_FOLDER = "components/tokenizer"
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

    small = {path.name: path.read_bytes() for path in model.iterdir() if is_ancillary(path.name)}
    own_tokenizer = tokenizer_class(small)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _lay_stand_in(small, Path(folder), with_tokenizer=own_tokenizer is None)
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
    shutil.rmtree(target / MODEL_FOLDER)
    shutil.copytree(model, target / MODEL_FOLDER, copy_function=_link_weights)
    # MLflow's note that it found no licence, with the path of our temporary folder.
    (target / "LICENSE.txt").unlink(missing_ok=True)
    described = Model.load(str(target))
    if own_tokenizer is not None:
        shutil.rmtree(target / _TOKENIZER_FOLDER)
        _write(small, target / _TOKENIZER_FOLDER)
        # A class that transformers does not have: MLflow asks AutoTokenizer, and trusts the code.
        described.flavors["transformers"]["tokenizer_type"] = own_tokenizer
    described.model_size_bytes = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    described.save(str(target / "MLmodel"))


def _lay_stand_in(small: dict[str, bytes], folder: Path, *, with_tokenizer: bool) -> None:
    """What MLflow looks at while it saves: no weights, and nothing that has code of its own.

    It loads the tokenizer, and transformers would ask on the terminal whether to run that code.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    about = json.loads(small[CONFIG])
    about.pop("auto_map", None)
    if with_tokenizer:
        _write(small, folder)
    else:
        words = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps(about))


def _link_weights(source: str, target: str) -> None:
    """The rest is small and copied, so that whoever edits it edits the package alone."""
    if is_weights(Path(source)):
        os.link(source, target)
    else:
        shutil.copy(source, target)


def _write(files: dict[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


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
