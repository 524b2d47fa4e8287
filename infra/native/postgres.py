"""PostgreSQL in a folder of its own, on loopback, with a port and a password of its own.

    with temporary_cluster() as cluster:              # for a test: gone afterwards
        cluster.create_database("mlflow")
        cluster.url("mlflow")                         # postgresql://ckptfuse:...@127.0.0.1:.../mlflow

PostgreSQL refuses to run as root. Root's cluster belongs to the user ``postgres``, whom Debian's
package makes; everybody else's runs as themselves. The system's own cluster is never touched.
"""

import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from ckptfuse.errors import CkptfuseError, ConfigurationError
from ckptfuse.processes import end_with_parent

#: The cluster's superuser. It has a password, and is let in over TCP on loopback alone.
USER = "ckptfuse"
_DEBIAN = Path("/usr/lib/postgresql")
_SETTINGS = "cluster.json"
#: PostgreSQL waits for its clients to leave on SIGTERM.
FAST_SHUTDOWN = signal.SIGINT
_PATIENCE = 60.0  # seconds for a server to answer


def binaries() -> Path:
    """The folder with ``initdb`` and ``postgres``: Debian's newest, or that of the search path.

    Raises ConfigurationError with the package to install.
    """
    found = [path.parent for path in _DEBIAN.glob("*/bin/initdb")]
    if found:
        return max(found, key=lambda folder: float(folder.parent.name))
    if (on_path := shutil.which("initdb")) is not None:
        return Path(on_path).resolve().parent
    raise ConfigurationError(
        "PostgreSQL's server is not installed: no initdb in /usr/lib/postgresql/*/bin nor on the "
        "path (Debian: apt-get install postgresql)"
    )


@dataclass(frozen=True)
class Cluster:
    """A cluster in ``folder``. Whoever knows the password may do anything in it."""

    folder: Path
    port: int
    password: str

    def url(self, database: str, driver: str = "postgresql") -> str:
        """A database's address; ``driver`` such as ``postgresql+asyncpg``."""
        return f"{driver}://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    @cached_property
    def _account(self) -> pwd.struct_passwd | None:
        """Who runs the server, if not we ourselves."""
        if os.geteuid() != 0:
            return None
        try:
            return pwd.getpwnam("postgres")
        except KeyError:
            raise ConfigurationError(
                "PostgreSQL refuses to run as root, and there is no user postgres to run it "
                "(Debian: apt-get install postgresql)"
            ) from None

    def start(
        self, *, durable: bool = True, preexec: Callable[[], None] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the server in a session of its own; returns it once it answers.

        It writes to ``folder/log``. ``durable=False`` for data that nobody wants after a crash.
        Raises CkptfuseError with the end of the log when it does not come up.
        """
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", "", *([] if durable else ["-F"])]
        command = [str(binaries() / "postgres"), "-D", str(self.folder / "data"), *options]
        log = self.folder / "log"
        with log.open("ab") as out:
            server = self._spawn(command, stdout=out, stderr=out, preexec_fn=preexec)
        deadline = time.monotonic() + _PATIENCE
        while not self.is_ready():
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                tail = log.read_text(errors="replace")[-2000:]
                raise CkptfuseError(f"PostgreSQL in {self.folder} does not come up:\n{tail}")
            time.sleep(0.1)
        return server

    def is_ready(self) -> bool:
        address = ["-h", "127.0.0.1", "-p", str(self.port)]
        asked = [str(binaries() / "pg_isready"), "-q", *address]
        return subprocess.run(asked, check=False).returncode == 0

    def create_database(self, name: str) -> None:
        """Make an empty database, unless it is there."""
        address = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER]
        made = subprocess.run(
            [str(binaries() / "createdb"), *address, name],
            env={**os.environ, "PGPASSWORD": self.password, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode != 0 and "already exists" not in made.stderr:
            raise CkptfuseError(f"database {name} on port {self.port}: {made.stderr.strip()}")

    def initialise(self) -> None:
        """Lay the cluster's files, unless they are there."""
        if (self.folder / "data" / "PG_VERSION").is_file():
            return
        self._check_reachable()
        data, secret = self.folder / "data", self.folder / "password"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(mode=0o700)
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        self._hand_over(data, secret)
        command = [
            str(binaries() / "initdb"), "--pgdata", str(data), "--username", USER,
            "--pwfile", str(secret), "--auth", "scram-sha-256", "--encoding", "UTF8",
            "--locale", "C.UTF-8", "--no-sync", "--no-instructions",
        ]  # fmt: skip
        made = self._spawn(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = made.communicate()
        secret.unlink()
        if made.returncode != 0:
            shutil.rmtree(data, ignore_errors=True)
            raise CkptfuseError(f"initdb in {data}: {said.decode(errors='replace').strip()}")

    def _spawn(self, command: list[str], **options: object) -> subprocess.Popen[bytes]:
        account = self._account
        identity = (
            {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
        )
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **identity,
            **options,
        )

    def _hand_over(self, *paths: Path) -> None:
        if self._account is not None:
            for path in paths:
                os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _check_reachable(self) -> None:
        """Raise ConfigurationError when the server's user may not enter the folder."""
        if self._account is None:
            return
        self.folder.chmod(0o711)
        closed = [parent for parent in self.folder.parents if not parent.stat().st_mode & 0o001]
        if closed:
            raise ConfigurationError(
                f"PostgreSQL refuses to run as root, and the user postgres cannot enter "
                f"{closed[-1]} on the way to {self.folder}: choose another folder, run as "
                f"another user than root, or `chmod o+x {closed[-1]}`"
            )


def open_cluster(folder: Path) -> Cluster:
    """The cluster in this folder, made if need be; with the port and password it had before."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / _SETTINGS
    if settings.is_file():
        cluster = Cluster(folder, **json.loads(settings.read_text()))
    else:
        cluster = Cluster(folder, free_port(), secrets.token_urlsafe(24))
        settings.touch(mode=0o600)
        told = asdict(cluster)
        del told["folder"]
        settings.write_text(json.dumps(told))
    cluster.initialise()
    return cluster


@contextmanager
def temporary_cluster() -> Iterator[Cluster]:
    """A running cluster that is gone afterwards, in a folder that the server's user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="ckptfuse-postgres-"))
    server = None
    try:
        cluster = open_cluster(folder)
        server = cluster.start(durable=False, preexec=end_with_parent)
        yield cluster
    finally:
        if server is not None:
            server.send_signal(FAST_SHUTDOWN)
            server.wait(timeout=_PATIENCE)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
