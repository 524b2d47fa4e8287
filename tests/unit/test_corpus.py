"""Documents to splits: what is drawn, nothing on two sides, whatever is added or reordered."""

import hashlib
import json
import os
import random
import tempfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptfuse.corpus import (
    SPLITS,
    Corpus,
    Document,
    KeptCorpus,
    documents_of,
    documents_to_score,
    jsonl,
    read_corpus,
    split_of,
)
from ckptfuse.cut import Cut
from ckptfuse.errors import CorpusError
from ckptfuse.packing import build
from ckptfuse.params import Budget, CorpusParams, Domain, DomainBudget, Shares
from ckptfuse.store import FolderStore
from ckptfuse.tokenizing import Encoded, Tokenizer, load_tokenizer
from tests.unit.test_blocks import write_tokenizer


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


def test_a_corpus_without_domains_or_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.domains"):
        read_corpus(CorpusParams())
    with pytest.raises(CorpusError, match=r"a\.jsonl: domain 'text' has no documents of its own"):
        read_corpus(corpus_of(tmp_path / "a.jsonl", ["", ""]))


def test_a_domain_with_no_document_in_a_split_is_told_how_many_it_has_in_all(
    tmp_path: Path,
) -> None:
    """A book as one text file: on one side it is whole, on the others there is nothing."""
    (tmp_path / "book.txt").write_text("word " * 1_000)
    params = CorpusParams.of({"prose": str(tmp_path / "book.txt")})
    corpus = read_corpus(params)
    (own,) = (split for split in SPLITS if documents_of(corpus, split, params)["prose"])
    assert documents_to_score(corpus, own, params) == documents_of(corpus, own, params)
    for split in set(SPLITS) - {own}:
        expected = rf"book\.txt: domain 'prose' has no document in {split}\. It has 1 in all"
        with pytest.raises(CorpusError, match=expected):
            documents_to_score(corpus, split, params)


# -- the draw ----------------------------------------------------------------------------------

SMALL = {"tokens": {"selection": 3, "audit": 5, "report": 2}, "tokens_per_document": 2}


def drawn(texts: list[str], **changes: object) -> list[tuple[str, str]]:
    """Split and text of what is drawn within the small budgets, in the order of the draw."""
    with tempfile.TemporaryDirectory() as folder:
        params = corpus_of(Path(folder, "a.jsonl"), texts, **{**SMALL, **changes})
        documents = read_corpus(params).domains["text"]
    splits = [split_of(d, salt=params.salt, shares=params.shares) for d in documents]
    return [(split, document.text) for split, document in zip(splits, documents, strict=True)]


def drawn_by_sorting(texts: list[str]) -> set[tuple[str, str]]:
    """The same from its definition, with all the texts in memory."""
    found: set[tuple[str, str]] = set()
    budgets: dict[str, int] = dict(SMALL["tokens"])  # type: ignore[call-overload]
    counted = dict.fromkeys(budgets, 0)

    def sha256(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    for text in sorted(set(texts), key=lambda text: sha256(f"draw:0:{sha256(text)}")):
        split = split_of(Document(text, sha256(text)), salt="ckptfuse", shares=Shares())
        if counted[split] < 32 * budgets[split]:
            counted[split] += min(max(len(text.encode()), 32), 64)
            found.add((split, text))
    return found


MANY = st.lists(st.text("aé\n", min_size=1, max_size=80), min_size=1, max_size=60)
LONG = st.lists(st.text("aé \n", min_size=1, max_size=300), min_size=1, max_size=20)


@given(texts=MANY)
@settings(max_examples=60, deadline=None)
def test_the_first_documents_that_the_budget_can_use_are_drawn(texts: list[str]) -> None:
    assert set(drawn(texts)) == drawn_by_sorting(texts)


@given(texts=MANY, more=MANY)
@settings(max_examples=60, deadline=None)
def test_a_document_never_changes_sides_and_comes_in_by_no_other_ones_arrival(
    texts: list[str], more: list[str]
) -> None:
    before, after = drawn(texts), drawn([*more, *texts])
    kept = [item for item in after if item[1] in texts]
    assert kept == [item for item in before if item in kept]


@given(texts=MANY | LONG)
@settings(max_examples=60, deadline=None)
def test_what_was_drawn_and_is_drawn_again_is_the_same_corpus(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both = {"a": write_texts(folder / "a.jsonl", texts)}
        both["b"] = write_texts(folder / "b.jsonl", [*texts, "b's own"])
        params = CorpusParams.model_validate({"domains": both, **SMALL})
        first = read_corpus(params)
        for domain, documents in first.domains.items():
            (folder / f"{domain}.jsonl").write_bytes(jsonl(documents))
        again = read_corpus(params)
    assert (again.domains, again.digest) == (first.domains, first.digest)
    assert again.sources["a"].bytes == sum(document.size for document in first.domains["a"])


def test_only_documents_that_are_drawn_and_budgets_make_another_corpus(tmp_path: Path) -> None:
    texts = [f"document {number} of some length, and then a little more" for number in range(300)]
    usual = corpus_of(tmp_path / "a.jsonl", texts, **SMALL)
    used = {text for _, text in drawn(texts)}
    assert len(used) < 20
    unused = next(text for text in texts if text not in used)
    fewer = corpus_of(tmp_path / "b.jsonl", [text for text in texts if text != unused], **SMALL)
    assert read_corpus(fewer).digest == read_corpus(usual).digest
    other = corpus_of(tmp_path / "c.jsonl", [text for text in texts if text not in used], **SMALL)
    assert read_corpus(other).digest != read_corpus(usual).digest
    audit = {**SMALL["tokens"], "audit": 4}  # type: ignore[dict-item]
    smaller = corpus_of(tmp_path / "a.jsonl", texts, **{**SMALL, "tokens": audit})
    assert read_corpus(smaller).digest != read_corpus(usual).digest


def test_a_domain_may_have_a_budget_of_its_own(tmp_path: Path) -> None:
    texts = [f"document {number} of some length, and then a little more" for number in range(300)]
    usual = corpus_of(tmp_path / "a.jsonl", texts, **SMALL)
    own = usual.domains["text"].model_copy(update={"tokens": DomainBudget(audit=50)})
    params = usual.model_copy(update={"domains": {"text": own}})
    assert params.budget("text") == Budget(selection=3, audit=50, report=2)
    before, after = read_corpus(usual), read_corpus(params)
    for split in SPLITS:
        few, many = documents_of(before, split, params), documents_of(after, split, params)
        assert (len(many["text"]) > len(few["text"])) == (split == "audit")
        assert many["text"][: len(few["text"])] == few["text"]
    assert before.digest != after.digest


def test_the_whole_text_is_drawn_when_it_is_asked_for(tmp_path: Path) -> None:
    params = corpus_of(tmp_path / "a.jsonl", TEXTS, **SMALL)
    assert {d.text for d in read_corpus(params, whole=True).domains["text"]} == set(TEXTS)


def test_copies_are_counted_and_the_set_of_documents_is_named(tmp_path: Path) -> None:
    first = corpus_of(tmp_path / "a.jsonl", [*TEXTS, "", *TEXTS[:7]], **SMALL)
    source = read_corpus(first).sources["text"]
    assert (source.documents, source.distinct, source.files) == (207, 200, 1)
    assert source.bytes == sum(len(text) for text in [*TEXTS, *TEXTS[:7]])
    second = corpus_of(tmp_path / "b.jsonl", [*reversed(TEXTS)], **SMALL)
    assert read_corpus(second).sources["text"].digest == source.digest
    third = corpus_of(tmp_path / "c.jsonl", TEXTS[1:], **SMALL)
    assert read_corpus(third).sources["text"].digest != source.digest


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_memory_holds_what_is_drawn_and_not_the_file(tmp_path: Path, form: str) -> None:
    texts = [f"{number} " + "x" * 10_000 for number in range(3_000)]
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        write_texts(path, texts)
    else:
        column = pa.table({"text": texts})
        pq.write_table(column, path, row_group_size=100, compression=None, use_dictionary=False)
    params = CorpusParams(
        domains={"text": Domain(path=str(path))},
        tokens=Budget(selection=1_000, audit=1_000, report=1_000),
    )
    assert path.stat().st_size > 30_000_000
    tracemalloc.start()
    corpus = read_corpus(params)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert corpus.sources["text"].documents == 3_000
    assert peak < 12_000_000


# -- long documents ----------------------------------------------------------------------------


def long_texts() -> list[str]:
    chance = random.Random(0)
    words = ["the", "quick", "brown", "fox", "déjà", "vu", "🙂", "naïve\n", "合併檢查點", "  x"]
    return [" ".join(chance.choices(words, k=chance.choice((20, 200, 2_000)))) for _ in range(60)]


LITTLE = {"tokens": {"selection": 300, "audit": 500, "report": 200}, "tokens_per_document": 60}
DIGEST_OF_LONG_TEXTS = "f5bc58a66c27a753d953a44fc2ef765e340b533d9a5ef90aaf3f84956243e8cd"


def test_of_a_long_document_a_beginning_is_kept_under_the_name_of_the_whole(
    tmp_path: Path,
) -> None:
    whole = {Document.of(text).digest: text for text in long_texts()}
    corpus = read_corpus(corpus_of(tmp_path / "a.jsonl", long_texts(), **LITTLE))
    assert corpus.digest == DIGEST_OF_LONG_TEXTS
    assert corpus.sources["text"].bytes == sum(len(text.encode()) for text in whole.values())
    documents = corpus.domains["text"]
    for document in documents:
        assert whole[document.digest].startswith(document.text)
        assert document.size == len(whole[document.digest].encode())
        assert document.is_whole == (document.text == whole[document.digest])
        assert document.is_whole or 64 * 60 <= len(document.text) < 64 * 60 + 20
    assert 5 < sum(not document.is_whole for document in documents) < len(documents) - 5


def test_blocks_of_beginnings_are_those_of_whole_documents(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(FolderStore(write_tokenizer(tmp_path / "t", bos_token="<s>")))
    whole = {Document.of(text).digest: Document.of(text) for text in long_texts()}
    params = corpus_of(tmp_path / "a.jsonl", long_texts(), **LITTLE)
    corpus = read_corpus(params)
    for split in SPLITS:
        drawn = documents_of(corpus, split, params)["text"]
        one, other = (
            build(
                {"text": documents},
                tokenizer,
                digest="d",
                cut=Cut(32),
                tokens={"text": getattr(params.budget("text"), split)},
                tokens_per_document=60,
            )
            for documents in (drawn, [whole[document.digest] for document in drawn])
        )
        for name in ("tokens", "starts", "lengths", "context", "document", "bytes"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_long_text_without_white_space_is_kept_whole(tmp_path: Path) -> None:
    """Where it was cut, its last word would be another one; and it may be all one word."""
    text = "合併檢查點" * 2_000
    (document,) = read_corpus(corpus_of(tmp_path / "a.jsonl", [text], **LITTLE)).domains["text"]
    assert document == Document.of(text)


def test_a_beginning_that_makes_too_few_tokens_gives_what_it_has(tmp_path: Path) -> None:
    """One document of rules or blanks among millions must not stop a service."""
    text = ("=" * 1_000 + " ") * 100
    tokenizer = Tokenizer(
        lambda text: Encoded([0] * text.count(" "), [(0, 1)] * text.count(" "), None), 1, "digest"
    )
    params = corpus_of(tmp_path / "a.jsonl", [text], **LITTLE)
    (document,) = read_corpus(params).domains["text"]
    assert not document.is_whole
    blocks = build({"text": [document]}, tokenizer, digest="d", cut=Cut(8), tokens_per_document=60)
    assert len(blocks.tokens) == 1 + document.text.count(" ")


def test_a_file_of_beginnings_is_scored_by_hand_as_what_it_holds(tmp_path: Path) -> None:
    drawn = read_corpus(corpus_of(tmp_path / "a.jsonl", long_texts(), **LITTLE)).domains["text"]
    (tmp_path / "b.jsonl").write_bytes(jsonl(drawn))
    by_hand = read_corpus(CorpusParams.of({"text": str(tmp_path / "b.jsonl")}), whole=True)
    assert set(by_hand.domains["text"]) == {Document.of(document.text) for document in drawn}


# -- kept on disk ------------------------------------------------------------------------------


def test_a_corpus_is_read_once_for_each_version_of_its_files(tmp_path: Path) -> None:
    params = corpus_of(tmp_path / "a.jsonl", TEXTS, **SMALL)
    first = KeptCorpus(params, tmp_path / "kept")
    assert first.digest == read_corpus(params).digest
    file = tmp_path / "a.jsonl"
    then = file.stat()
    file.write_bytes(b"\n" * then.st_size)
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    again = KeptCorpus(params, tmp_path / "kept")  # as another process would
    assert (again.digest, again.corpus) == (first.digest, first.corpus)
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns + 1))
    with pytest.raises(CorpusError, match="no documents"):
        _ = KeptCorpus(params, tmp_path / "kept").digest


def test_a_corpus_with_long_documents_is_kept_as_their_beginnings(tmp_path: Path) -> None:
    params = corpus_of(tmp_path / "a.jsonl", ["word " * 200_000, "short"], **LITTLE)
    first = KeptCorpus(params, tmp_path / "kept").corpus
    (kept,) = (tmp_path / "kept").glob("*/text.jsonl")
    assert kept.stat().st_size < 5_000
    assert KeptCorpus(params, tmp_path / "kept").corpus == first


def test_two_that_read_a_corpus_at_once_keep_one(tmp_path: Path) -> None:
    params = corpus_of(tmp_path / "a.jsonl", TEXTS, **SMALL)
    start = threading.Barrier(2)

    def read(kept: KeptCorpus) -> Corpus:
        start.wait()
        return kept.corpus

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(read, [KeptCorpus(params, tmp_path / "kept") for _ in range(2)])
    assert one == other
    (folder,) = (tmp_path / "kept").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "text.jsonl"]
