"""``python -m bench.scale_look PARAMS``: one look in a process of its own, and what it took.

Prints one JSON line: seconds of the whole ``watch`` run and of a flow that does nothing, which is
Prefect's own part; requests to S3; memory; and of a publication what is work and no overhead.
Both without Prefect's heartbeats: a flow that sends them ends a whole number of seconds after its
start, since it waits for a thread that looks once a second whether to end.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ckptfuse.params_loading import load_params
from ckptfuse.peak import peak_memory
from flows.environment import prepare


class Stopwatch:
    """Seconds spent within some functions, and when one of them last returned."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*arguments, **options)
            finally:
                self.last[name] = time.perf_counter()
                spent = self.last[name] - began
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        setattr(owner, attribute, timed)


def main() -> None:
    params_file = sys.argv[1]
    params = load_params(Path(params_file))
    prepare(Path(params.workspace))

    from prefect import flow, flow_engine

    setattr(flow_engine, "_send_heartbeats", lambda *_, **__: nullcontext())  # noqa: B010

    import ckptfuse.jobs
    import ckptfuse.merge.folder
    import tasks.artifacts
    import tasks.registry
    from flows.watch import watch

    @flow(persist_result=False)
    def nothing(params_file: str) -> None:
        """What Prefect takes for a flow."""

    nothing(params_file)  # connections, and what is imported at first use
    began = time.perf_counter()
    nothing(params_file)
    own = time.perf_counter() - began

    stopwatch, requests = Stopwatch(), []
    stopwatch.wrap(ckptfuse.jobs, "run_jobs", "scoring")
    stopwatch.wrap(ckptfuse.merge.folder, "write_fusion", "merging")
    stopwatch.wrap(tasks.artifacts, "store", "uploading")
    stopwatch.wrap(tasks.registry.Registry, "set_alias", "alias")
    if str(params.bucket).startswith("s3://"):
        from ckptfuse.store.s3_client import client

        client().meta.events.register("before-send.s3", lambda **_: requests.append(1))
    began = time.perf_counter()
    summary = watch(params_file)
    ended = time.perf_counter()
    told = {
        "seconds": ended - began,
        "prefect": own,
        "requests": len(requests),
        "checkpoints": summary.complete,
        "scored": summary.scored,
        "skipped": summary.skipped,
        "published": summary.published,
        "verdicts": [verdict.verdict for verdict in summary.verdicts],
        "until_alias": stopwatch.last["alias"] - began if "alias" in stopwatch.last else None,
        "work": {n: s for n, s in stopwatch.seconds.items() if n != "alias"},
        "peak_mib": peak_memory() / 2**20,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
