"""A copy of a finished project that a test may damage: its absolute paths lead into the copy."""

import shutil
import sqlite3
import subprocess
from pathlib import Path

from tests.conftest import Project

#: Columns of MLflow's database that hold the place of artifacts.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def copy_of(finished: Project, folder: Path) -> Project:
    """Copy all of a project, its hard links as such; its bucket is `CKPTFUSE_BUCKET` then."""
    subprocess.run(["cp", "-a", finished.folder, folder], check=True)
    project = Project(folder, finished.trajectory)
    old, new = finished.folder.as_uri(), folder.as_uri()
    with sqlite3.connect(project.workspace / "mlflow.db") as database:
        for table, column in _PLACES:
            database.execute(f"UPDATE {table} SET {column} = REPLACE({column}, ?, ?)", (old, new))
    database.close()
    shutil.rmtree(project.workspace / "report", ignore_errors=True)
    return project
