"""Documents to splits: nothing lost, nothing on two sides, whatever is added or reordered."""

import json
from pathlib import Path

import pytest

from ckptfuse.corpus import SPLITS, documents_of, read_corpus
from ckptfuse.errors import CorpusError
from ckptfuse.params import CorpusParams, Domain


def write_texts(path: Path, texts: list[str]) -> Domain:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return Domain(path=str(path))


def corpus_of(path: Path, texts: list[str], **others: object) -> CorpusParams:
    return CorpusParams.model_validate({"domains": {"text": write_texts(path, texts)}, **others})


def texts_by_split(params: CorpusParams) -> dict[str, list[str]]:
    corpus = read_corpus(params)
    return {
        split: [document.text for document in documents_of(corpus, split, params)["text"]]
        for split in SPLITS
    }


TEXTS = [f"document number {number}" for number in range(200)]


def test_each_document_is_in_one_split_and_none_is_lost(tmp_path: Path) -> None:
    splits = texts_by_split(corpus_of(tmp_path / "a.jsonl", TEXTS))
    assert sorted(text for texts in splits.values() for text in texts) == sorted(TEXTS)
    assert all(len(texts) > 25 for texts in splits.values())


def test_the_order_of_the_file_and_copies_in_it_change_nothing(tmp_path: Path) -> None:
    first = corpus_of(tmp_path / "a.jsonl", TEXTS)
    second = corpus_of(tmp_path / "b.jsonl", [*reversed(TEXTS), *TEXTS[:7]])
    assert texts_by_split(first) == texts_by_split(second)
    assert read_corpus(first).digest == read_corpus(second).digest


def test_documents_keep_their_side_when_others_are_added(tmp_path: Path) -> None:
    before = texts_by_split(corpus_of(tmp_path / "a.jsonl", TEXTS[:100]))
    after = texts_by_split(corpus_of(tmp_path / "b.jsonl", TEXTS))
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)


def test_another_salt_splits_anew_and_is_another_corpus(tmp_path: Path) -> None:
    one = corpus_of(tmp_path / "a.jsonl", TEXTS)
    other = corpus_of(tmp_path / "a.jsonl", TEXTS, salt="another")
    assert texts_by_split(one) != texts_by_split(other)
    assert read_corpus(one).digest != read_corpus(other).digest


def test_a_document_of_two_domains_counts_in_the_first(tmp_path: Path) -> None:
    domains = {
        "b": write_texts(tmp_path / "b.jsonl", ["shared", "own"]),
        "a": write_texts(tmp_path / "a.jsonl", ["shared"]),
    }
    corpus = read_corpus(CorpusParams(domains=domains))
    assert [d.text for d in corpus.domains["a"]] == ["shared"]
    assert [d.text for d in corpus.domains["b"]] == ["own"]


@pytest.mark.parametrize("line", ["{", '{"txt": "a"}', '"text"', '{"text": 3}', "[1]"])
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 3"):
        read_corpus(CorpusParams(domains={"text": Domain(path=str(path))}))


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    params = corpus_of(tmp_path / "a.jsonl", [text])
    assert read_corpus(params).domains["text"][0].text == text


def test_windows_line_ends_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    corpus = read_corpus(CorpusParams(domains={"text": Domain(path=str(path))}))
    assert {d.text for d in corpus.domains["text"]} == {"one", "two"}


def test_a_missing_file_and_a_corpus_without_domains_are_told(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such corpus file"):
        read_corpus(CorpusParams(domains={"text": Domain(path=str(tmp_path / "absent.jsonl"))}))
    with pytest.raises(CorpusError, match=r"corpus\.domains"):
        read_corpus(CorpusParams())
