"""A transformers model from a state dict, without weights on disk."""

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckptfuse.checkpoints import CONFIG
from ckptfuse.errors import CkptfuseError, DamagedCheckpoint
from ckptfuse.own_code import offered, reason_of
from ckptfuse.protocol import Numerics

_MORE_GPUS = "scoring.gpus_per_job spreads a model over more of them"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Outline:
    """A model without values (on torch's meta device), and the attention to score it with."""

    config: Any  # what was read, of which the model may have taken a part
    model: Any
    attention: str


def outline_of(
    config: Mapping[str, object],
    *,
    numerics: Numerics,
    where: str,
    code: Mapping[str, bytes] | None = None,
) -> Outline:
    """The causal language model of ``config``, as build_model knows it before it has weights.

    Raises CkptfuseError naming ``where`` when there is no such model here.
    """
    if not config:
        raise CkptfuseError(
            f"{where}: no config.json says what model this is; name a folder that has it with "
            "scoring.model (--model)"
        )
    load_transformers()
    files = {CONFIG: json.dumps(dict(config)).encode(), **(code or {})}
    with offered(files) as folder:
        hf_config, model = _outline(folder, where, trusted=code is not None)
    return Outline(hf_config, model, _attention(model, numerics, where))


def build_model(
    config: Mapping[str, object],
    state_dict: Mapping[str, torch.Tensor],
    *,
    numerics: Numerics,
    where: str,
    split: bool = False,
    code: Mapping[str, bytes] | None = None,
) -> torch.nn.Module:
    """The causal language model of ``config`` with these weights, ready to score.

    Tied weights are tied again. ``split`` spreads the layers over the visible GPUs (accelerate's
    device_map), for a model that one cannot hold. ``code`` are the model's own Python files, which
    are run where its configuration asks for them; None: they are not trusted.

    Raises CkptfuseError naming ``where`` when there is no such model here, and DamagedCheckpoint
    when the weights do not fit the configuration: a model with freshly initialised parts must not
    be scored.
    """
    outline = outline_of(config, numerics=numerics, where=where, code=code)
    _check_shapes(outline.model, state_dict, where)
    try:
        model, info = type(outline.model).from_pretrained(
            None,
            config=outline.config,
            state_dict=dict(state_dict),
            dtype=_DTYPES[numerics.dtype],
            attn_implementation=outline.attention,
            device_map="auto" if split else None,
            output_loading_info=True,
        )
    except (ValueError, KeyError, RuntimeError, ImportError, OSError) as error:
        raise CkptfuseError(f"{where}: transformers cannot build this model: {error}") from error
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[fault]:
            named = ", ".join(sorted(str(key) for key in info[fault])[:3])
            raise DamagedCheckpoint(
                f"{where}: the weights do not fit config.json: {len(info[fault])} "
                f"{fault.replace('_', ' ')}, first {named}"
            )
    spread = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if spread & {"cpu", "disk"}:
        raise CkptfuseError(f"{where}: it does not fit into these GPUs; {_MORE_GPUS}")
    if not split:
        try:
            model = model.to(numerics.device_class)
        except torch.OutOfMemoryError as error:
            raise CkptfuseError(f"{where}: it does not fit; {_MORE_GPUS}: {error}") from error
    return model.eval()  # type: ignore[no-any-return]


def _attention(outline: Any, numerics: Numerics, where: str) -> str:
    """The attention to score with: what was asked for, or the model's own where that is all it has.

    Not so for a soft cap, which torch's attention leaves out without a word: scores that were made
    in that way are known as ``sdpa``, and those with the cap must not be taken for the same.
    """
    if not getattr(outline, "_supports_sdpa", False):
        return "eager"
    cap = getattr(outline.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and numerics.attention != "eager":
        raise CkptfuseError(
            f"{where}: its attention has a soft cap (attn_logit_softcapping: {cap:g}), which "
            f"{numerics.attention} leaves out; set scoring.attention: eager (--attention eager)"
        )
    return numerics.attention


def _check_shapes(
    outline: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], where: str
) -> None:
    """Of tensors that the model has under the same name; transformers would not name them."""
    expected = outline.state_dict()
    for name, tensor in state_dict.items():
        if name in expected and expected[name].shape != tensor.shape:
            raise DamagedCheckpoint(
                f"{where}: the weights do not fit config.json: {name} is {list(tensor.shape)} "
                f"where {list(expected[name].shape)} is expected"
            )


def _outline(folder: str, where: str, *, trusted: bool) -> tuple[Any, Any]:
    """The configuration that lies in a folder, and its model without any values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        # Said, not left out: transformers would ask on the terminal.
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted
        )
        with torch.device("meta"):
            # What the configuration asks for, such as flash attention, may not be installed here.
            outline = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trusted, attn_implementation="eager"
            )
    except Exception as error:  # an architecture's code may do anything
        reason = reason_of(error, folder, where)
        raise CkptfuseError(f"{where}: transformers cannot build this model: {reason}") from error
    return config, outline


def load_transformers() -> None:
    """Import what models need of transformers, without what scoring does not.

    Its loss functions and text generation import scikit-learn, pandas and scipy where they find
    them: a third of a job's start.
    """
    unneeded = [name for name in ("sklearn", "pandas", "scipy") if name not in sys.modules]
    for name in unneeded:
        sys.modules[name] = None  # type: ignore[assignment]  # to the import system: not installed
    try:
        for module in ("transformers.modeling_utils", "transformers.models.auto.modeling_auto"):
            importlib.import_module(module)
    finally:
        for name in unneeded:
            del sys.modules[name]
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def vocabulary_size(model: Any) -> int:
    """Rows of the input embedding: token ids must be below it."""
    return int(model.get_input_embeddings().weight.shape[0])
