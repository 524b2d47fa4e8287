"""Documents that are nearly alike, found wherever two splits have them, and told."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptfuse.corpus import SPLITS, Document, Split, near_duplicates, read_corpus
from ckptfuse.corpus.near_duplicates import THRESHOLD, Placed, Twins, twins_across_splits
from ckptfuse.corpus.survey import near_duplicates_of, survey
from ckptfuse.inspection import inspect_corpus
from ckptfuse.params import CorpusParams, Domain
from ckptfuse.steps.survey import known_survey, survey_corpus
from tests.helpers import make_service
from tests.unit.test_blocks import write_tokenizer


def words(count: int, seed: int) -> list[str]:
    return random.Random(seed).choices([f"w{number}" for number in range(500)], k=count)


def changed(text: list[str], share: float, seed: int) -> list[str]:
    """The text with its last words replaced by others."""
    kept = len(text) - round(share * len(text))
    return text[:kept] + words(len(text) - kept, seed)


def placed(split: Split, text: list[str] | str, domain: str = "a") -> Placed:
    joined = text if isinstance(text, str) else " ".join(text)
    return Placed(domain, split, Document(joined, f"digest of {joined[:30]} in {split}"))


def found(*items: Placed) -> list[tuple[int, int]]:
    return [(items.index(t.one), items.index(t.other)) for t in twins_across_splits(items)]


def test_a_changed_copy_in_another_split_is_found_from_both_sides() -> None:
    text = words(300, 1)
    items = [
        placed("audit", text),
        placed("selection", words(300, 2)),
        placed("selection", changed(text, 0.1, 3)),
        placed("report", changed(text, 0.6, 4)),
    ]
    assert found(*items) == [(0, 2), (2, 0)]


def test_copies_within_a_split_are_nobodys_business_and_domains_make_no_difference() -> None:
    text = words(200, 5)
    items = [
        placed("audit", text),
        placed("audit", changed(text, 0.05, 6)),
        placed("report", changed(text, 0.05, 7), domain="b"),
    ]
    assert found(*items) == [(0, 2), (1, 2), (2, 0)]


def test_texts_of_few_words_and_of_none_and_without_spaces_are_compared_too() -> None:
    items = [
        placed("audit", "Two words."),
        placed("report", "two, words"),
        placed("selection", "two others"),
        placed("audit", "* * *"),
        placed("report", "+ + +"),
        placed("audit", "合併檢查點的困惑度決定權重,並在保留的文本上證明它更好"),
        placed("selection", "合併檢查點的困惑度決定權重,並在保留的文本上證明它很好"),
    ]
    assert found(*items) == [(0, 1), (1, 0), (5, 6), (6, 5)]


def test_what_is_found_is_what_comparing_every_pair_finds() -> None:
    """But for pairs close to the threshold, that hashing may miss."""
    chance = random.Random(8)
    originals = [words(chance.randint(30, 400), seed) for seed in range(40)]
    items = []
    for number in range(200):
        text = changed(chance.choice(originals), chance.random() * 0.2, 100 + number)
        items.append(placed(chance.choice(SPLITS), text))

    def shingles(item: Placed) -> set[tuple[str, ...]]:
        tokens = item.document.text.split()
        return {tuple(tokens[start : start + 5]) for start in range(len(tokens) - 4)}

    sets = [shingles(item) for item in items]
    must, may = set(), set()
    for one, mine in enumerate(sets):
        for other, theirs in enumerate(sets):
            if items[one].split != items[other].split:
                similarity = len(mine & theirs) / len(mine | theirs)
                if similarity >= THRESHOLD:
                    may.add((one, items[other].split))
                if similarity >= THRESHOLD + 0.05:
                    must.add((one, items[other].split))
    twins = twins_across_splits(items)
    answer = {(items.index(twin.one), twin.other.split) for twin in twins}
    assert len(must) > 30
    assert must <= answer <= may
    assert all(exact(twin, sets, items) == pytest.approx(twin.similarity) for twin in twins)


def exact(twins: Twins, sets: list[set[tuple[str, ...]]], items: list[Placed]) -> float:
    one, other = sets[items.index(twins.one)], sets[items.index(twins.other)]
    return len(one & other) / len(one | other)


def forms(count: int) -> list[Placed]:
    """Filled-in forms, alike by less than the threshold; each tenth is of a pair that is closer."""
    template, items = words(60, 9), []
    for number in range(count):
        own = words(18, 1_000 + (number - 1 if number % 10 == 1 else number))
        text = [*template, *own[:17], f"form {number}"]
        items.append(placed(SPLITS[number % 3], " ".join(text)))
    return items


def test_forms_of_one_template_take_no_more_work_a_document_however_many_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []
    jaccard = near_duplicates._jaccard

    def counting(*sets: NDArray[np.uint64]) -> float:
        compared.append(1)
        return jaccard(*sets)

    monkeypatch.setattr(near_duplicates, "_jaccard", counting)
    items = forms(1_000)
    pairs = [pair for n in range(0, 1_000, 10) for pair in ((n, n + 1), (n + 1, n))]
    twins = [(t.one, t.other) for t in twins_across_splits(items)]
    assert [(items[one], items[other]) for one, other in pairs] == twins
    assert len(compared) < 100 * len(items)


# -- survey ------------------------------------------------------------------------------------


@pytest.fixture
def params(tmp_path: Path) -> CorpusParams:
    """60 documents in near-identical pairs, and 40 others."""
    texts = [changed(words(120, seed // 2), 0.05, seed) for seed in range(60)]
    texts += [words(120, seed) for seed in range(1000, 1040)]
    rows = [json.dumps({"text": " ".join(text)}) for text in texts]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows, *rows[:3]]))
    return CorpusParams(domains={"pairs": Domain(path=str(tmp_path / "pairs.jsonl"))})


def test_a_survey_counts_the_documents_of_each_split_and_those_with_a_twin_elsewhere(
    params: CorpusParams,
) -> None:
    record = survey(read_corpus(params), params)
    splits = record.domains["pairs"]
    assert sum(held.documents for held in splits.values()) == 100
    for one in SPLITS:
        for other in SPLITS:  # a pair is told from both sides
            there = splits[one].near_duplicates.get(other, 0)
            assert there == splits[other].near_duplicates.get(one, 0)
    assert splits["audit"].near_duplicates["selection"] > 0
    assert len(record.examples) == 5
    for pair in record.examples:
        assert pair.one.split != pair.other.split
        assert pair.one.beginning[:20] == pair.other.beginning[:20]
    count = splits["audit"].near_duplicates["selection"]
    audit = splits["audit"].documents
    told = f"pairs: {count} of {audit} audit documents have a near-duplicate in selection"
    assert told in near_duplicates_of(record)


def test_an_inspection_adds_copies_and_tokens_within_the_budget(
    params: CorpusParams, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", bos_token="<s>")
    small = params.model_copy(update={"tokens": params.tokens.model_copy(update={"audit": 500})})
    read: list[tuple[int, int]] = []
    seen = inspect_corpus(
        small, tokenizer=str(tokenizer), read=lambda size, of: read.append((size, of))
    )
    assert seen.tokens is not None
    assert seen.tokens["pairs"]["audit"] == 500
    assert seen.tokens["pairs"]["selection"] > 500
    source = seen.sources["pairs"]
    assert source.documents - source.distinct == 3
    size = (tmp_path / "pairs.jsonl").stat().st_size
    assert sum(part for part, _ in read) == size
    assert {of for _, of in read} == {size}
    plain = inspect_corpus(small)
    assert plain.tokens is None
    assert len(plain.contents.examples) > 5  # all of them


def test_the_service_surveys_a_corpus_once(params: CorpusParams, tmp_path: Path) -> None:
    service = make_service(tmp_path, corpus=params.model_dump())
    assert known_survey(service) is None
    record = survey_corpus(service)
    assert known_survey(service) == record
    (tmp_path / "pairs.jsonl").unlink()
    assert survey_corpus(service) == record
