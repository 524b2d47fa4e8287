"""PostgreSQL as a process of ours: what the stack and other tests stand on."""

import os
import subprocess

from infra.native.postgres import USER, binaries, open_cluster, temporary_cluster


def psql(url: str, statement: str, password: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    if password is not None:
        environment["PGPASSWORD"] = password
    command = [binaries() / "psql", "--no-password", "-Atc", statement, url]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_cluster_lets_in_who_has_its_password_and_keeps_what_it_is_given() -> None:
    with temporary_cluster() as cluster:
        cluster.create_database("scores")
        cluster.create_database("scores")  # again: it is there
        made = psql(cluster.url("scores"), "create table losses as select 2.5 as loss")
        assert made.returncode == 0, made.stderr
        assert psql(cluster.url("scores"), "select loss from losses").stdout == "2.5\n"

        address = f"postgresql://{USER}@127.0.0.1:{cluster.port}/scores"
        assert psql(address, "select 1").returncode != 0
        assert "password authentication failed" in psql(address, "select 1", "guess").stderr
        listening = psql(cluster.url("scores"), "show listen_addresses").stdout
        assert listening == "127.0.0.1\n"

        again = open_cluster(cluster.folder)
        assert (again.port, again.password) == (cluster.port, cluster.password)
    assert not cluster.folder.exists()
