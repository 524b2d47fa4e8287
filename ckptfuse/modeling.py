"""A transformers model from a state dict, without weights on disk."""

import importlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ckptfuse.errors import DamagedCheckpoint
from ckptfuse.protocol import Numerics

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(
    config: Mapping[str, object],
    state_dict: Mapping[str, torch.Tensor],
    *,
    numerics: Numerics,
    where: str,
    split: bool = False,
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """The causal language model of ``config`` with these weights, ready to score.

    Tied weights are tied again. ``split`` spreads the layers over the visible GPUs (accelerate's
    device_map), for a model that one cannot hold. Raises DamagedCheckpoint naming ``where`` when
    the weights do not fit the configuration: a model with freshly initialised parts must not be
    scored.
    """
    load_transformers()
    from transformers import AutoModelForCausalLM

    try:
        hf_config = _config(config, trust_remote_code)
        with torch.device("meta"):
            model_class = type(
                AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust_remote_code)
            )
        model, info = model_class.from_pretrained(
            None,
            config=hf_config,
            state_dict=dict(state_dict),
            dtype=_DTYPES[numerics.dtype],
            attn_implementation=numerics.attention,
            device_map="auto" if split else None,
            output_loading_info=True,
        )
    except (ValueError, KeyError, RuntimeError, ImportError, OSError) as error:
        raise DamagedCheckpoint(
            f"{where}: transformers cannot build this model: {error}"
        ) from error
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[fault]:
            named = ", ".join(sorted(str(key) for key in info[fault])[:3])
            raise DamagedCheckpoint(
                f"{where}: the weights do not fit config.json: {len(info[fault])} "
                f"{fault.replace('_', ' ')}, first {named}"
            )
    if not split:
        model = model.to(numerics.device_class)
    return model.eval()  # type: ignore[no-any-return]


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


def _config(config: Mapping[str, object], trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(dict(config)))
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
