"""Documents to splits, splits to blocks: nothing lost, nothing twice, nothing on two sides."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfuse.blocks import Blocks, Tokenizer, build, load, load_tokenizer, save
from ckptfuse.corpus import SPLITS, Document, documents_of, read_corpus
from ckptfuse.errors import CorpusError
from ckptfuse.params import CorpusParams, Domain, Shares
from ckptfuse.store import FolderStore
from flows.demo.trainer import train_tokenizer


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


def test_a_share_of_zero_leaves_a_split_empty(tmp_path: Path) -> None:
    params = corpus_of(tmp_path / "a.jsonl", TEXTS, shares=Shares(selection=0, audit=1, report=1))
    assert texts_by_split(params)["selection"] == []


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the quick brown fox", "déjà vu 🙂 naïve"] * 20, folder, vocab_size=300)
    return load_tokenizer(FolderStore(folder))


def blocks_of(tokenizer: Tokenizer, texts: list[str], length: int, **others: object) -> Blocks:
    documents = {"text": [Document(text, text) for text in texts]}
    return build(documents, tokenizer, digest="d", block_length=length, **others)  # type: ignore[arg-type]


WORDS = st.text(st.sampled_from("the quick déà🙂 \n\u2028x"), min_size=1, max_size=60)


@given(texts=st.lists(WORDS, min_size=1, max_size=6), length=st.integers(2, 20))
@settings(max_examples=80, deadline=None)
def test_every_token_after_the_first_is_predicted_exactly_once(
    tokenizer: Tokenizer, texts: list[str], length: int
) -> None:
    blocks = blocks_of(tokenizer, texts, length)
    predicted = np.concatenate([blocks.block(index)[1:] for index in range(len(blocks))])
    assert predicted.tolist() == blocks.tokens[1:].tolist()
    assert blocks.predicted.sum() == len(blocks.tokens) - 1
    assert blocks.lengths.max() <= length


@given(texts=st.lists(WORDS, min_size=1, max_size=6), length=st.integers(2, 20))
@settings(max_examples=80, deadline=None)
def test_the_bytes_of_all_blocks_are_those_of_the_text(
    tokenizer: Tokenizer, texts: list[str], length: int
) -> None:
    """With a separator before each document, every token of every text is predicted."""
    assert blocks_of(tokenizer, texts, length).bytes.sum() == sum(len(t.encode()) for t in texts)


def test_a_separator_stands_before_each_document_unless_it_is_unwanted(
    tokenizer: Tokenizer,
) -> None:
    texts = ["the quick", "brown fox"]
    with_separator = blocks_of(tokenizer, texts, 100).tokens.tolist()
    without = blocks_of(tokenizer, texts, 100, bos="none").tokens.tolist()
    assert with_separator.count(tokenizer.separator) == 2
    assert [token for token in with_separator if token != tokenizer.separator] == without


def test_budgets_cut_the_domain_and_each_document(tokenizer: Tokenizer) -> None:
    texts = ["the quick brown fox " * 20] * 5
    assert len(blocks_of(tokenizer, texts, 16, tokens=70).tokens) == 70
    assert len(blocks_of(tokenizer, texts, 16, tokens_per_document=10).tokens) == 50


def test_a_block_belongs_to_the_document_of_most_of_its_tokens(tokenizer: Tokenizer) -> None:
    texts = ["the", "quick brown fox " * 30]
    assert blocks_of(tokenizer, texts, 64).document.tolist()[0] == 1


def test_documents_of_two_domains_are_never_one_cluster(tokenizer: Tokenizer) -> None:
    documents = {name: [Document(name * 50, name)] for name in ("a", "b")}
    blocks = build(documents, tokenizer, digest="d", block_length=8)
    of = {name: set(blocks.document[blocks.domain == code]) for code, name in enumerate(("a", "b"))}
    assert not of["a"] & of["b"]


def test_a_domain_with_nothing_to_predict_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(CorpusError, match="domain 'text' has 0 documents"):
        blocks_of(tokenizer, [], 8)


def test_blocks_come_back_from_disk_as_they_were(tokenizer: Tokenizer, tmp_path: Path) -> None:
    blocks = blocks_of(tokenizer, ["the quick brown fox"] * 4, 8)
    save(blocks, tmp_path / "blocks")
    save(blocks, tmp_path / "blocks")  # another process was as quick
    loaded = load(tmp_path / "blocks")
    assert loaded.domains == blocks.domains
    for name in ("tokens", "starts", "lengths", "domain", "document", "bytes"):
        assert np.array_equal(getattr(loaded, name), getattr(blocks, name))


def test_a_folder_without_a_tokenizer_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.tokenizer"):
        load_tokenizer(FolderStore(tmp_path))
