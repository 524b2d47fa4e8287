"""ckptfuse: fuse the checkpoints of a running pretraining into better models, unattended.

The library: it knows torch, safetensors, transformers and boto3, and no orchestrator, registry
or versioning tool. ``tasks`` and ``flows`` build on it; nothing here imports from them.
"""

__version__ = "0.1.0"
