"""The demo: the main job in small. A real pretraining, watched, fused, judged and registered live.

trainer (a process)  --checkpoint-N-->  bucket  <--looks--  ckptfuse watch (a process)
                                                                |
this program: a table of what the records say, then the result  <-- records
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from statistics import median

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ckptfuse.errors import CkptfuseError, ConfigurationError
from ckptfuse.losses import Estimate, Losses, combine
from ckptfuse.overview import PUBLISHED, Overview, overview, steps_saved
from ckptfuse.params import PARAMS_FILE, Params
from ckptfuse.params_loading import load_params
from ckptfuse.report.page import write_report
from ckptfuse.service import Service, losses_of, open_service, target_loss
from ckptfuse.steps.look import discover, next_actions
from ckptfuse.store import is_s3, remove_folder
from flows.demo.texts import gather, write_jsonl
from flows.demo.trainer import Pretraining, train_tokenizer
from flows.show import table
from tasks.pipeline import template

_MARKER = "demo.json"
#: How often the service looks and the table is drawn anew, in seconds.
_INTERVAL = 1.0
_IN_DISTRIBUTION = "python"

console = Console(highlight=False, soft_wrap=True)
progress = Console(stderr=True, highlight=False, soft_wrap=True)


def run_demo(run: Pretraining | None = None) -> None:
    """Pretrain in the present folder's workspace while the service watches, and show what came out.

    Raises CkptfuseError when no fusion beat the best single checkpoint: then something is broken.
    """
    started = time.monotonic()
    params = _prepare()
    service = open_service(params)
    root = service.workspace.root
    run = replace(run or Pretraining.beneath(root), bucket=Path(str(params.bucket)))
    _lay_texts(params, run)
    run.bucket.mkdir(parents=True)
    progress.print(
        f"A Llama is pretrained for {run.steps} steps in one process; the service watches its "
        f"checkpoints in another. Logs: {root}/demo"
    )
    with _process(_trainer(run), root / "demo" / "trainer.log") as trainer:
        watch = [sys.executable, "-P", "-m", "flows.cli", "watch"]
        fast = {"CKPTFUSE_WATCH__INTERVAL_SECONDS": str(_INTERVAL)}
        with _process(watch, root / "demo" / "service.log", fast) as watcher:
            _show_live(service, trainer, watcher)
    _print_result(service, minutes=(time.monotonic() - started) / 60)


# -- before ------------------------------------------------------------------------------------


def _prepare() -> Params:
    """The parameters, and a workspace without the traces of an earlier demo."""
    file = Path(PARAMS_FILE)
    if not file.exists():
        shutil.copyfile(template(PARAMS_FILE), file)
        progress.print(f"{file} is written: the demo's parameters, and a start for your own")
    params = load_params(file)
    root, bucket = Path(params.workspace), params.bucket or ""
    if is_s3(bucket) or not Path(bucket).is_relative_to(root):
        raise ConfigurationError(
            f"{file}: the demo trains into a bucket inside the workspace ({root}), and `bucket` is "
            f"{bucket or 'not set'}; run it in another folder, where it writes its own parameters"
        )
    if root.exists() and any(root.iterdir()):
        if not (root / _MARKER).is_file():
            raise ConfigurationError(
                f"{root} is not empty and was not made by a demo; move it away, or run the demo in "
                "another folder"
            )
        progress.print(f"The earlier demo in {root} is replaced.")
        remove_folder(root)
    (root / "demo").mkdir(parents=True)
    (root / _MARKER).write_text(json.dumps({"made_by": "ckptfuse demo"}))
    return params


def _lay_texts(params: Params, run: Pretraining) -> None:
    """Text of this machine: for training, and for each domain of the corpus."""
    texts = gather()
    write_jsonl(run.texts, texts.train)
    train_tokenizer(texts.train, run.tokenizer)
    for name, domain in params.corpus.domains.items():
        if name not in texts.domains:
            raise ConfigurationError(
                f"this machine has no text for the domain {name!r}; found: "
                f"{', '.join(texts.domains)}. Remove it from corpus.domains"
            )
        write_jsonl(Path(domain.path), texts.domains[name])


def _trainer(run: Pretraining) -> list[str]:
    return [sys.executable, "-P", "-m", "flows.demo.trainer", *run.arguments()]


@contextmanager
def _process(
    command: list[str], log: Path, extra: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in a file; it ends with the context."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(extra or {})}
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# -- meanwhile ---------------------------------------------------------------------------------


def _show_live(
    service: Service, trainer: subprocess.Popen[bytes], watcher: subprocess.Popen[bytes]
) -> None:
    """Draw the table until the trainer has ended and the service has nothing left to do."""
    with Live(console=progress, auto_refresh=False) as live:
        while True:
            seen = overview(service)
            live.update(table(seen), refresh=True)
            _check_alive("trainer", trainer, service, may_end=True)
            _check_alive("service", watcher, service, may_end=False)
            if trainer.poll() is not None and seen.rows and _is_idle(service):
                live.update(table(overview(service)), refresh=True)
                return
            time.sleep(_INTERVAL)


def _check_alive(
    name: str, process: subprocess.Popen[bytes], service: Service, *, may_end: bool
) -> None:
    status = process.poll()
    if status is None or (may_end and status == 0):
        return
    log = service.workspace.root / "demo" / f"{name}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise CkptfuseError(f"the demo's {name} ended with status {status}; from {log}:\n{tail}")


def _is_idle(service: Service) -> bool:
    return not next_actions(service, *discover(service), live=True)


# -- after -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """The models that are compared: step and losses on report text."""

    newest: tuple[int, Losses]
    best: tuple[int, Losses]  # the single checkpoint of lowest loss on selection
    champion: tuple[int, Losses]

    def named(self) -> list[tuple[str, int, Losses]]:
        """The models from left to right; the newest and the best may be one."""
        if self.newest[0] == self.best[0]:
            singles = [("newest, and best single", *self.newest)]
        else:
            singles = [("newest", *self.newest), ("best single", *self.best)]
        return [*singles, ("champion", *self.champion)]


def _print_result(service: Service, *, minutes: float) -> None:
    seen = overview(service)
    if seen.champion is None:
        raise CkptfuseError(
            "no fusion passed the gate. A constant learning rate leaves noise that averaging "
            f"removes, so this is a fault; see {service.workspace.root}/demo/service.log"
        )
    result = _result(service, seen)
    write_report(service)
    console.print()
    console.print(_perplexities(service, result))
    _print_gains(service, result)
    _print_saved(seen)
    _print_commands(service, seen)
    console.print(f"\n[dim]{minutes:.1f} minutes[/dim]")


def _result(service: Service, seen: Overview) -> _Result:
    known = list(service.checkpoints().values())
    newest = max(known, key=lambda c: c.step)
    best = min(
        known,
        key=lambda c: target_loss(
            service, losses_of(service, c.fingerprint, c.tokenizer, "selection")
        ),
    )
    assert seen.champion is not None
    champion = losses_of(service, seen.champion.fusion, newest.tokenizer, "report")
    return _Result(
        newest=(newest.step, losses_of(service, newest.fingerprint, newest.tokenizer, "report")),
        best=(best.step, losses_of(service, best.fingerprint, best.tokenizer, "report")),
        champion=(seen.champion.step, champion),
    )


def _perplexities(service: Service, result: _Result) -> Table:
    drawn = Table(
        title="Perplexity on report text, which chose nothing and judged nothing (± std. error)",
        title_justify="left",
        title_style="bold",
    )
    drawn.add_column("text", no_wrap=True)
    models = result.named()
    for name, step, _ in models:
        drawn.add_column(f"{name}\nstep {step}", justify="right", no_wrap=True)
    own, others = _IN_DISTRIBUTION, sorted(set(result.champion[1].domains) - {_IN_DISTRIBUTION})
    for kind, domains in (("in distribution", [own]), ("out of distribution", others)):
        drawn.add_section()
        drawn.add_row(f"[dim]{kind}[/dim]")
        for domain in domains:
            drawn.add_row(
                f"  {domain}", *[_perplexity(losses.of(domain)) for _, _, losses in models]
            )
    return drawn


def _perplexity(estimate: Estimate) -> str:
    perplexity = math.exp(estimate.mean)
    return f"{perplexity:.2f} ± {perplexity * estimate.standard_error:.2f}"


def _print_gains(service: Service, result: _Result) -> None:
    *singles, (_, _, champion) = result.named()
    for name, step, losses in singles:
        differences = losses.minus(champion)
        gain = combine(differences, service.scorer.target_weights)
        by_domain = ", ".join(f"{d} {e.mean:+.4f}" for d, e in differences.items())
        console.print(
            f"Gain over the {name} (step {step}): [bold]{gain.mean:+.4f}[/bold] ± "
            f"{gain.standard_error:.4f} nats per token, paired ({by_domain})"
        )


def _print_saved(seen: Overview) -> None:
    """At how many further steps the raw run reached a fusion's loss."""
    ahead = zip(seen.rows, steps_saved(seen.rows), strict=True)
    published = {r.step: saved for r, saved in ahead if r.verdict in PUBLISHED}
    reached = {step: saved for step, saved in published.items() if saved}
    last = seen.rows[-1].step
    if reached:
        examples = ", ".join(f"{step}: {saved}" for step, saved in reached.items())
        console.print(
            f"Training steps saved: {median(reached.values()):.0f} in the median over the fusions "
            f"whose loss the raw run reached by step {last} (fusion at step: further steps; "
            f"{examples})"
        )
    open_ended = [step for step in published if step not in reached]
    if open_ended:
        steps = ", ".join(str(step) for step in open_ended)
        console.print(
            f"When the raw run ended at step {last} it had not reached what fusing gave at step "
            f"{steps}: there the saving is more than the run shows."
        )


def _print_commands(service: Service, seen: Overview) -> None:
    assert seen.champion is not None
    root, name = service.workspace.root, service.params.model_name
    tag = next(p.tag for p in seen.publications if p.fusion == seen.champion.fusion)
    uri = f"sqlite:///{root}/mlflow.db"
    load = (
        f"import mlflow; mlflow.set_tracking_uri({uri!r}); "
        f"pipe = mlflow.transformers.load_model('models:/{name}@champion'); "
        "print(pipe('def main(', max_new_tokens=20)[0]['generated_text'])"
    )
    page = (root / "report" / "index.html").as_uri()
    again, ledger = quote(str(root / "again")), quote(str(root / "ledger"))
    cache = quote(str(root / "ledger" / ".dvc" / "cache"))
    threads = service.params.scoring.threads
    as_here = f"CKPTFUSE_SCORING__THREADS={threads} " if threads else ""
    commands = {
        "Put the installed commands on the path": [
            f"export PATH={quote(str(Path(sys.executable).parent))}:$PATH"
        ],
        "Open the MLflow page": [f"mlflow ui --backend-store-uri {quote(uri)}"],
        "Load the champion": [f'python -c "{load}"'],
        "Open the report": [f"python -m webbrowser {page}"],
        "See that nothing is left to do": ["ckptfuse watch --once"],
        "Make the same bytes again with DVC": [
            f"git -c advice.detachedHead=false clone --quiet --branch {tag} {ledger} {again}",
            f"cd {again}",
            f"dvc cache dir --local {cache} && dvc checkout corpus.dvc",
            f"{as_here}dvc repro --force && dvc status && git status",
        ],
    }
    for title, lines in commands.items():
        console.print(f"\n[bold]{title}[/bold]")
        for line in lines:
            console.print(f"  {line}", markup=False)
