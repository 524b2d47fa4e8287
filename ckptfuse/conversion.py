"""Checkpoints and merges of a trainer's own layout as Hugging Face models.

A converter is a function of the team's own::

    def to_hf(tensors: dict[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]

It is given the model's tensors under the checkpoint's names, and the configuration of a Hugging
Face folder (``scoring.model``); it answers with the tensors of that model. Renaming, splitting
fused tensors and unstacking layers are linear, so a merge of checkpoints, converted, is the merge
of converted checkpoints: scores are those of converted models, what is published is a converted
merge, and what is resumed from stays in the trainer's layout.
``examples/torchtitan_llama.py`` is one.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ckptfuse.checkpoints import CONFIG, read_ancillary
from ckptfuse.digests import content_digest, digest
from ckptfuse.errors import ConfigurationError, ConversionError, MissingFile
from ckptfuse.imports import load_function
from ckptfuse.store import open_store

if TYPE_CHECKING:
    import torch

    from ckptfuse.layouts import Layout

Converter = Callable[[dict[str, "torch.Tensor"], Mapping[str, object]], dict[str, "torch.Tensor"]]


def model_config(folder: str) -> Mapping[str, object]:
    """The configuration of the Hugging Face folder that a converter's tensors belong to."""
    try:
        config = json.loads(open_store(folder).read(CONFIG))
    except MissingFile as error:
        raise ConfigurationError(
            f"{folder}: no {CONFIG} of the model that checkpoints are converted to"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{folder}/{CONFIG}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{folder}/{CONFIG}: not a JSON object")
    return config


def identity(converter: str | None, folder: str | None) -> str | None:
    """What scores depend on: the converter's name and the configuration's content."""
    if folder is None:
        if converter is not None:
            raise ConfigurationError(
                "scoring.converter needs scoring.model, a folder with the config.json (and "
                "tokenizer) of the Hugging Face model that it makes"
            )
        return None
    return f"{converter or ''}@{content_digest(open_store(folder).read(CONFIG))}"


def made_by(converter: str | None, folder: str) -> str:
    """What a converted merge's bytes depend on: the converter's name, and all that lies beside."""
    beside = read_ancillary(open_store(folder))
    files = [[path, content_digest(data)] for path, data in sorted(beside.items())]
    return f"{converter or ''}@{digest(files)}"


def convert(
    converter: str | None,
    folder: str,
    tensors: Mapping[str, "torch.Tensor"],
    where: str,
) -> tuple[Mapping[str, object], Mapping[str, "torch.Tensor"]]:
    """The configuration and tensors of the Hugging Face model.

    Raises ConversionError naming ``where`` when the converter does not know the tensors.
    """
    config = model_config(folder)
    if converter is None:
        return config, tensors
    function: Converter = load_function(converter, "converter")
    try:
        return config, function(dict(tensors), config)
    except Exception as error:  # a function of the team's own
        raise ConversionError(
            f"{where}: converter {converter!r} cannot convert it: {error!r}"
        ) from error


def check_converter(converter: str, folder: str, layout: "Layout") -> None:
    """Raise ConversionError if the converter looks for tensors that are not there.

    It is given tensors without values, and what else it may fail at with those says nothing.
    """
    import torch

    from ckptfuse.torch_dtypes import torch_dtype

    where = layout.checkpoint
    tensors = {
        name: torch.empty(tensor.shape, dtype=torch_dtype(tensor, where), device="meta")
        for name, tensor in layout.tensors.items()
    }
    try:
        convert(converter, folder, tensors, where.uri)
    except ConversionError as error:
        if isinstance(error.__cause__, KeyError | IndexError):
            raise
