"""``python -m experiments``: train, study, and write the results. See ``__init__``."""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from experiments.place import OUTSIDE, Place
from experiments.pretrain import TOKENS, tokenized
from experiments.results import HERE, write_results
from flows.demo.texts import gather, write_jsonl
from flows.demo.trainer import train_tokenizer

VOCABULARY = 1_024
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("workspace/experiments"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="minutes: does everything work?")
    arguments = parser.parse_args()
    place = Place(arguments.folder.resolve(), tiny=arguments.tiny)
    lay_texts(place)
    _Studies(place, arguments.processes).run()
    results = place.root if arguments.tiny else HERE
    print(write_results(place, results))


def lay_texts(place: Place) -> None:
    """This machine's text: what is trained on, what is scored on, and the tokenizer."""
    if (place.texts / TOKENS).exists():
        return
    texts = gather()
    write_jsonl(place.texts / "train.jsonl", texts.train)
    for name in ("python", *OUTSIDE):
        if name in texts.domains:
            write_jsonl(place.texts / f"{name}.jsonl", texts.domains[name])
    train_tokenizer(texts.train, place.texts / "tokenizer", vocab_size=VOCABULARY)
    tokenized(place.texts)  # now, and not in two processes at once


class _Studies:
    """Every run and what is studied of it, so many processes at once, the longest runs first."""

    def __init__(self, place: Place, processes: int) -> None:
        self._place = place
        self._pool = ThreadPoolExecutor(processes)
        self._started = time.monotonic()
        (place.root / "logs").mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Raises CalledProcessError when one of them failed, after all others have ended."""
        with self._pool:
            trained = {run.name: self._pool.submit(self._train, run.name)
                       for run in self._place.runs()}  # fmt: skip
            studied = [
                self._pool.submit(self._study, t.name, trained[t.run])
                for t in self._place.trajectories()
            ]
        for future in studied:
            future.result()

    def _train(self, name: str) -> None:
        if not self._place.trained(name).exists():
            self._process("pretrain", name)

    def _study(self, name: str, trained: Future[None]) -> None:
        trained.result()
        if not self._place.checks(name).exists():
            self._process("examine", name)

    def _process(self, module: str, name: str) -> None:
        command = [sys.executable, "-m", f"experiments.{module}", str(self._place.root), name]
        if self._place.tiny:
            command.append("--tiny")
        log = self._place.root / "logs" / f"{module}-{name}.log"
        started = time.monotonic()
        with log.open("wb") as out:
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **_ENVIRONMENT},
                check=False,
            )  # fmt: skip
        took, since = time.monotonic() - started, (time.monotonic() - self._started) / 60
        print(f"{since:5.1f} min  {module} {name}: {took:.0f} s", file=sys.stderr, flush=True)
        if done.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{module} {name} ended with {done.returncode}; from {log}:\n{tail}")


if __name__ == "__main__":
    main()
