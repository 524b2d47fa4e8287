"""The commands by hand: they need checkpoints or text, and no service or workspace."""

from typing import Annotated

import typer

from ckptfuse.errors import ConfigurationError
from flows.commands.console import stderr, stdout
from flows.commands.service import ParamsOption

#: Of the environment variables that set the same caps for the service (params.yaml: reading).
READING = "CKPTFUSE_READING__"


def score(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or s3:// prefix.")],
    corpus: Annotated[
        list[str],
        typer.Option(help="NAME=PATH: JSON lines, text, Parquet, or a folder of them; repeatable."),
    ],
    field: Annotated[str, typer.Option(help="The field or column of the text.")] = "text",
    split: Annotated[
        str | None, typer.Option(help="selection, audit or report  [default: all the text]")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with a tokenizer  [default: the checkpoint]")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of context  [default: up to 1024]")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="packed, or rolling as lm-evaluation-harness has it")
    ] = "packed",
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a packed block predicts  [default: all]")
    ] = None,
    bos: Annotated[str, typer.Option(help="document: one before each document; or none")] = (
        "document"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    attention: Annotated[str, typer.Option(help="sdpa (torch's), or eager (the model's own)")] = (
        "sdpa"
    ),
    converter: Annotated[
        str | None, typer.Option(help="package.module:function, for a trainer's own layout.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder with config.json and tokenizer, where the checkpoint has none."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python of a model with its own.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score one checkpoint on text files: loss, perplexity, bits per byte."""
    corpora = domains_of(corpus, "--corpus")
    _check_choice("--split", split, (None, "selection", "audit", "report"))
    _check_choice("--layout", layout, ("packed", "rolling"))
    _check_choice("--bos", bos, ("document", "none"))
    _check_choice("--device", device, ("auto", "cpu", "cuda"))
    _check_choice("--attention", attention, ("sdpa", "eager"))
    from ckptfuse.once import score_once
    from flows.show import print_score, scoring_bar

    with scoring_bar(stderr) as progress:
        result = score_once(
            checkpoint,
            corpora,
            field=field,
            split=split,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            block_length=block_length,
            layout=layout,  # type: ignore[arg-type]
            stride=stride,
            bos=bos,  # type: ignore[arg-type]
            device=device,
            attention=attention,
            converter=converter,
            model=model,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print_score(result, checkpoint, stdout=stdout, stderr=stderr, as_json=as_json)


def corpus(
    domains: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=PATH", help="Domains  [default: those of params.yaml]"),
    ] = None,
    field: Annotated[str, typer.Option(help="Of NAME=PATH: the field or column of the text.")] = (
        "text"
    ),
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with a tokenizer, to count the tokens scored.")
    ] = None,
    params: ParamsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look through target text: documents, tokens, copies, near-duplicates across splits."""
    from ckptfuse.inspection import inspect_corpus
    from ckptfuse.params import CorpusParams
    from ckptfuse.params_loading import load_params
    from flows.show import print_corpus, reading_bar

    if domains:
        chosen = CorpusParams.of(domains_of(domains, "domain"), field=field)
    else:
        chosen = load_params(params).corpus
    with reading_bar(stderr) as read:
        seen = inspect_corpus(chosen, tokenizer=tokenizer or chosen.tokenizer, read=read)
    print_corpus(seen, stdout=stdout, stderr=stderr, as_json=as_json)


def merge(
    out: Annotated[str, typer.Argument(help="New folder or s3:// prefix.")],
    inputs: Annotated[list[str], typer.Argument(metavar="CHECKPOINT=WEIGHT...")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16  [default: as the inputs]")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="safetensors (a Hugging Face folder) or dcp (a distributed checkpoint to resume "
            "from)  [default: as the inputs]"
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="moments in a dcp: the newest's, their average, or none of them")
    ] = "newest",
    copy: Annotated[
        list[str] | None, typer.Option(help="Tensors (* for any characters) to copy, not merge.")
    ] = None,
    master: Annotated[
        list[str] | None, typer.Option(help="fp32 weights in the optimizer (* for any characters).")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse inputs whose copied tensors differ.")
    ] = False,
    megabytes_per_second: Annotated[
        float | None,
        typer.Option(envvar=f"{READING}MEGABYTES_PER_SECOND", help="Read no faster than this."),
    ] = None,
    requests_per_second: Annotated[
        float | None,
        typer.Option(envvar=f"{READING}REQUESTS_PER_SECOND", help="Start no more reads than this."),
    ] = None,
) -> None:
    """Merge checkpoints, oldest first; whatever is not merged is the last one's."""
    pairs = [pair(item, "input", "CHECKPOINT=WEIGHT") for item in inputs]
    try:
        weights = [float(weight) for _, weight in pairs]
    except ValueError as error:
        raise ConfigurationError(f"a weight is no number: {error}") from error
    _check_choice("--dtype", dtype, (None, "float32", "bfloat16", "float16"))
    _check_choice("--form", form, (None, "safetensors", "dcp"))
    _check_choice("--optimizer", optimizer, ("newest", "average", "none"))
    from ckptfuse.fusion import Recipe, check_weights

    check_weights(weights)
    if abs(sum(weights) - 1) > 1e-6:
        stderr.print(f"note: the weights sum to {sum(weights):g}; they are used as given")
    _cap_reads(megabytes_per_second, requests_per_second)
    from ckptfuse.merge.once import form_of, merge_once
    from flows.progress import merging_bar

    form = form or form_of(pairs[-1][0])
    if form == "safetensors" and (optimizer != "newest" or master):
        raise ConfigurationError("--optimizer and --master are for distributed checkpoints")
    with merging_bar(stderr) as progress:
        spec, contents = merge_once(
            out,
            [uri for uri, _ in pairs],
            weights,
            recipe=Recipe(
                dtype=dtype,
                copied=tuple(copy or ()),
                form=form,  # type: ignore[arg-type]
                optimizer=optimizer,  # type: ignore[arg-type]
                masters=tuple(master or ()),
                strict=strict,
            ),
            progress=progress,
        )
    size = sum(size for size, _ in contents.values())
    stderr.print(f"{len(contents)} files, {size / 1e6:.1f} MB, fusion {spec.id[:16]}")
    stdout.print(out, markup=False)


def domains_of(items: list[str], what: str) -> dict[str, str]:
    """Paths by name, of which each is given once."""
    corpora: dict[str, str] = {}
    for name, path in (pair(item, what, "NAME=PATH") for item in items):
        if name in corpora:
            raise ConfigurationError(
                f"{what} {name!r} is given twice; put its files into one folder, or give each a "
                "name of its own"
            )
        corpora[name] = path
    return corpora


def _check_choice(option: str, value: str | None, accepted: tuple[str | None, ...]) -> None:
    if value not in accepted:
        names = [name for name in accepted if name is not None]
        raise ConfigurationError(
            f"{option} {value!r}: {', '.join(names[:-1])} or {names[-1]} is expected"
        )


def _cap_reads(megabytes: float | None, requests: float | None) -> None:
    for name, value in {"megabytes": megabytes, "requests": requests}.items():
        if value is not None and not value > 0:
            raise ConfigurationError(f"--{name}-per-second {value:g}: more than 0 is expected")
    from ckptfuse.store import throttle

    throttle.configure(throttle.Limits(megabytes, requests))


def pair(text: str, what: str, form: str) -> tuple[str, str]:
    """Split at the last ``=`` for weights, so that URIs may hold one; NAME=FILE at the first."""
    left, equals, right = text.rpartition("=") if what == "input" else text.partition("=")
    if not (left and equals and right):
        raise ConfigurationError(f"{what} {text!r}: {form} is expected")
    return left, right
