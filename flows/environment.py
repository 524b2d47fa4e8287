"""Settings of Prefect, MLflow, DVC and transformers that must stand before they are imported.

No telemetry, and their files in the workspace rather than in the user's home. A value that the
user's environment already has stands.
"""

import os
from pathlib import Path

_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # About 15 s a request instead of four minutes: the next look tries again.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_OFFLINE": "1",
    # A busy machine takes up to a minute to start the embedded server; the default is 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "ckptfuse",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # of commands that run no flow
    # Failures reach the command line as exceptions; Prefect keeps their tracebacks with the run.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_WRAP_LINES": "false",
}


def prepare(workspace: Path) -> None:
    """Set what is not set."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(workspace.resolve() / "prefect"))
    os.environ.setdefault("MPLCONFIGDIR", str(workspace.resolve() / "cache" / "matplotlib"))
    os.environ.setdefault("HF_MODULES_CACHE", str(workspace.resolve() / "cache" / "modules"))
    os.environ.setdefault("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
