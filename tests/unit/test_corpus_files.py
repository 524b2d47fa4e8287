"""Texts of files of every form, on disk and on S3, and what is said of those without any."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ckptfuse.corpus import read_corpus
from ckptfuse.corpus.files import find_files
from ckptfuse.errors import CorpusError
from ckptfuse.params import CorpusParams, Domain
from ckptfuse.store import open_store
from tests.helpers import as_nobody
from tests.servers import S3Server

TEXTS = [f"text {number}: déjà \u2028 vu\n" for number in range(700)]


def lines(texts: list[str]) -> bytes:
    rows = (json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts)
    return "\n".join(rows).encode()


def write_parquet(path: Path, texts: list[str | None], kind: pa.DataType | None = None) -> None:
    column = pa.array(texts, kind or pa.string())
    other = pa.array(range(len(texts)))
    pq.write_table(pa.table({"id": other, "text": column}), path, row_group_size=100)


def read(path: Path | str, field: str = "text") -> list[str]:
    """The texts of a domain, in an order of their own."""
    params = CorpusParams(domains={"a": Domain(path=str(path), field=field)})
    return sorted(document.text for document in read_corpus(params, whole=True).domains["a"])


# -- forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.jsonl", lines),
        ("a.ndjson", lines),
        ("a.json", lines),
        ("a.jsonl.gz", lambda texts: gzip.compress(lines(texts))),
        ("a.json.bz2", lambda texts: bz2.compress(lines(texts))),
        ("a.jsonl.zst", lambda texts: pa.compress(lines(texts), "zstd", asbytes=True)),
        # as `cat` and parallel compressors leave them
        (
            "several.jsonl.gz",
            lambda texts: gzip.compress(lines(texts[:9]) + b"\n") + gzip.compress(lines(texts[9:])),
        ),
    ],
)
def test_json_lines_are_read_plain_and_compressed(
    tmp_path: Path, name: str, encode: Callable[[list[str]], bytes]
) -> None:
    (tmp_path / name).write_bytes(encode(TEXTS))
    assert read(tmp_path / name) == sorted(TEXTS)


def test_nulls_and_empty_texts_of_json_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "a"}\n')
    assert read(tmp_path / "a.jsonl") == ["a"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_parquet_is_read_whatever_its_kind_of_strings(tmp_path: Path, kind: pa.DataType) -> None:
    write_parquet(tmp_path / "a.parquet", [None, "", *TEXTS], kind)
    assert read(tmp_path / "a.parquet") == sorted(TEXTS)


def test_only_the_column_of_the_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    noise = pa.array([f"{number:0100}" for number in range(20_000)])
    table = pa.table({"text": pa.array([f"t{n}" for n in range(20_000)]), "noise": noise})
    pq.write_table(table, path, compression=None, use_dictionary=False)
    sizes: list[int] = []
    params = CorpusParams(domains={"a": Domain(path=str(path))})
    read_corpus(params, read=lambda size, of: sizes.append(size))
    assert sum(sizes) < path.stat().st_size / 2


def test_the_field_of_the_text_can_have_another_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "one"}')
    pq.write_table(pa.table({"content": ["two"]}), tmp_path / "b.parquet")
    assert read(tmp_path, field="content") == ["one", "two"]


def test_a_folder_is_all_that_is_in_it_whatever_its_form(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.jsonl").write_bytes(lines(["of lines"]))
    (tmp_path / "deep" / "er" / "c.txt.gz").write_bytes(gzip.compress(b"of a\nfile"))
    (tmp_path / "deep" / "A.MD").write_bytes(b"\xef\xbb\xbfof another")
    write_parquet(tmp_path / "deep" / "d.parquet", ["of a column"])
    for passed_over in ("_SUCCESS", ".b.jsonl.crc", "_tmp.jsonl", "picture.png"):
        (tmp_path / passed_over).write_bytes(b"\xff")
    found = [file.entry.path for file in find_files(str(tmp_path))]
    assert found == ["b.jsonl", "deep/A.MD", "deep/d.parquet", "deep/er/c.txt.gz"]
    assert read(tmp_path) == ["of a\nfile", "of a column", "of another", "of lines"]


def test_text_that_cannot_be_reached_is_told_and_not_left_out(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "closed").mkdir(parents=True)
    (corpus / "a.txt").write_text("own")
    (corpus / "_gone.txt").symlink_to("nothing")  # hidden, as all that begins so
    assert read(corpus) == ["own"]
    (corpus / "b.txt").symlink_to("nothing")
    with pytest.raises(CorpusError, match=r"b\.txt: a link to a file that is not there"):
        find_files(str(corpus))
    (corpus / "b.txt").unlink()
    (corpus / "closed").chmod(0)
    with as_nobody(corpus), pytest.raises(CorpusError, match=r"closed: cannot be listed: Perm"):
        find_files(str(corpus))


def test_links_to_folders_are_followed_and_those_that_lead_back_end(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "own", corpus / ".git", elsewhere / "deep", tmp_path / "further"):
        folder.mkdir(parents=True)
    (corpus / "own" / "a.txt").write_text("own")
    (elsewhere / "deep" / "b.txt").write_text("behind a link")
    (tmp_path / "further" / "c.txt").write_text("behind two links")
    for link, target in {
        corpus / "linked": elsewhere,
        corpus / "own" / "linked too": elsewhere,
        corpus / "alias": corpus / "own",
        corpus / "_hidden": tmp_path / "further",
        corpus / ".git" / "hidden": elsewhere,
        corpus / "own" / "itself": corpus,
        elsewhere / "more": tmp_path / "further",
        elsewhere / "deep" / "back": elsewhere,
        elsewhere / "nowhere": tmp_path / "absent",
    }.items():
        link.symlink_to(target)
    found = [file.entry.path for file in find_files(str(corpus))]
    assert found == ["linked/deep/b.txt", "linked/more/c.txt", "own/a.txt"]
    assert read(corpus) == ["behind a link", "behind two links", "own"]
    (tmp_path / "link to all").symlink_to(corpus)
    assert read(tmp_path / "link to all") == read(corpus)


def test_s3_gives_what_a_folder_gives(moto_s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[:300])))
    write_parquet(tmp_path / "part.parquet", TEXTS[300:])  # type: ignore[arg-type]
    uri = f"s3://bucket/{tmp_path.name}"
    for path in tmp_path.iterdir():
        open_store(f"{uri}/set.parquet").write(path.name, path.read_bytes())
    assert read(f"{uri}/set.parquet") == sorted(TEXTS)
    assert read(f"{uri}/set.parquet/a.jsonl.gz") == sorted(TEXTS[:300])
    assert read(uri) == sorted(TEXTS)
    with pytest.raises(CorpusError, match="no such corpus file, or an empty folder"):
        read(f"{uri}/absent.jsonl")


# -- what cannot be used -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["{", '{"txt": "a"}', '"text"', '{"text": 3}', "[1]", '{"a":' * 100_000]
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 3"):
        read(path)


def test_a_lone_surrogate_is_told_by_its_place_and_not_with_the_text(tmp_path: Path) -> None:
    """The text may be long, and nobody's business in a log."""
    secret = "a secret page " * 5_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{{"text": "{secret}\\ud83d end"}}\n')
    expected = r"a\.jsonl, line 2: character 70,001 of the text .*\(U\+D83D\)"
    with pytest.raises(CorpusError, match=expected) as told:
        read(tmp_path / "a.jsonl")
    assert "secret" not in str(told.value)
    assert len(str(told.value)) < 400


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    (tmp_path / "a.jsonl").write_bytes(lines([text]))
    assert read(tmp_path / "a.jsonl") == [text]


def test_windows_line_ends_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read(path) == ["one", "two"]


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2: not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_a_plain_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"a\.txt: not UTF-8"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(lines(TEXTS))[:-20]),
        ("cut.jsonl.zst", pa.compress(lines(TEXTS), "zstd", asbytes=True)[:-20]),
        ("plain.jsonl.gz", lines(TEXTS)),
        ("plain.txt.zst", b"text"),
    ],
)
def test_a_file_that_cannot_be_decompressed_is_named(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=f"{name}: cannot be decompressed"):
        read(tmp_path / name)


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one"])
    with pytest.raises(CorpusError, match=r"a\.parquet: no column 'content'; .*field.*: id, text"):
        read(tmp_path / "a.parquet", field="content")
    with pytest.raises(CorpusError, match=r"a\.parquet, column 'id': strings .* holds int64"):
        read(tmp_path / "a.parquet", field="id")


def test_of_thousands_of_columns_some_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({f"column {n}": ["x"] for n in range(3_000)}), tmp_path / "a.parquet")
    with pytest.raises(
        CorpusError, match=r"no column 'text'.*: column 0, column 1, .* \.\.\.$"
    ) as e:
        read(tmp_path / "a.parquet")
    assert len(str(e.value)) < 600


def test_a_parquet_file_that_is_none_or_holds_no_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 100)
    with pytest.raises(CorpusError, match=r"a\.parquet, column 'text': cannot be read as Parquet"):
        read(tmp_path / "a.parquet")
    latin = pa.array(["déjà".encode("latin-1")]).view(pa.string())
    pq.write_table(pa.table({"text": latin}), tmp_path / "b.parquet")
    with pytest.raises(CorpusError, match=r"b\.parquet, column 'text': not UTF-8"):
        read(tmp_path / "b.parquet")


def test_what_is_missing_or_of_no_known_form_is_told(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"absent\.jsonl: no such corpus file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(CorpusError, match="an empty folder"):
        read(tmp_path)
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"a\.docx: its name does not say.*\.jsonl"):
        read(tmp_path / "a.docx")
    with pytest.raises(CorpusError, match=r"of 1 files in this folder none is \.jsonl"):
        read(tmp_path)
