"""What `ckptfuse doctor` finds out of a deployment, as far as no Prefect, MLflow or DVC is needed.

A check changes nothing that belongs to anyone else, and says what it did. Those of Prefect,
MLflow, Git and DVC are in ``tasks/checks``.
"""

from ckptfuse.checks.check import Check, failed, ok, warning

__all__ = ["Check", "failed", "ok", "warning"]
