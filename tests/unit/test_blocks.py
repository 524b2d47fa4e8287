"""Documents to token blocks: every token predicted once, every byte counted once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ckptfuse.blocks import Blocks, block_digest, load, save
from ckptfuse.corpus import Document
from ckptfuse.cut import Cut
from ckptfuse.errors import CorpusError
from ckptfuse.packing import build
from ckptfuse.store import FolderStore
from ckptfuse.tokenizing import Encoded, Tokenizer, load_tokenizer


def write_tokenizer(folder: Path, **special: str) -> Path:
    """A byte-level BPE of some merges, as transformers saves it."""
    raw = Tokenizers(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=sorted(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the quick brown fox", "déjà vu 🙂 naïve"] * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos_token="<s>")
    return load_tokenizer(FolderStore(folder))


def blocks_of(tokenizer: Tokenizer, texts: list[str], length: int, **others: object) -> Blocks:
    documents = {"text": [Document(text, text) for text in texts]}
    cut = Cut(length, **{k: others.pop(k) for k in ("layout", "stride", "bos") if k in others})  # type: ignore[arg-type]
    return build(documents, tokenizer, digest="d", cut=cut, **others)  # type: ignore[arg-type]


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


def made_up(offsets: list[tuple[int, int]] | None, count: int = 3) -> Tokenizer:
    return Tokenizer(lambda text: Encoded(list(range(count)), offsets, None), None, "digest")


def test_a_token_inside_the_one_before_it_counts_no_byte_twice() -> None:
    blocks = blocks_of(made_up([(0, 3), (1, 2), (3, 4)]), ["abcd"], 2)
    assert blocks.bytes.tolist() == [0, 1]


def test_white_space_that_no_token_covers_counts_with_the_token_after_it_and_at_the_end() -> None:
    blocks = blocks_of(made_up([(0, 1), (2, 3), (3, 4)]), ["a bc "], 2)
    assert blocks.bytes.tolist() == [2, 2]


def test_without_offsets_the_bytes_are_spread_evenly() -> None:
    blocks = blocks_of(made_up(None, count=4), ["é" * 4], 2)
    assert blocks.bytes.tolist() == [2, 2, 2]


def test_a_separator_stands_before_each_document_unless_it_is_unwanted(
    tokenizer: Tokenizer,
) -> None:
    texts = ["the quick", "brown fox"]
    with_separator = blocks_of(tokenizer, texts, 100).tokens.tolist()
    without = blocks_of(tokenizer, texts, 100, bos="none").tokens.tolist()
    assert with_separator.count(tokenizer.separator) == 2
    assert [token for token in with_separator if token != tokenizer.separator] == without


def test_a_tokenizer_without_a_token_to_put_before_documents_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = load_tokenizer(FolderStore(write_tokenizer(tmp_path)))
    texts = ["the quick", "brown fox"]
    as_none = blocks_of(without, texts, 100, bos="none").tokens.tolist()
    assert not caplog.messages
    for _ in range(2):
        assert blocks_of(without, texts, 100).tokens.tolist() == as_none
    (message,) = caplog.messages
    assert without.digest[:12] in message
    assert "scoring.bos: none" in message
    with pytest.raises(CorpusError, match="needs a begin- or end-of-sequence token"):
        blocks_of(without, texts, 100, layout="rolling")


def test_budgets_cut_the_domain_and_each_document(tokenizer: Tokenizer) -> None:
    texts = ["the quick brown fox " * 20] * 5
    assert len(blocks_of(tokenizer, texts, 16, tokens={"text": 70}).tokens) == 70
    assert len(blocks_of(tokenizer, texts, 16, tokens_per_document=10).tokens) == 50


def test_a_block_belongs_to_the_document_of_most_of_its_tokens(tokenizer: Tokenizer) -> None:
    texts = ["the", "quick brown fox " * 30]
    assert blocks_of(tokenizer, texts, 64).document.tolist()[0] == 1


def test_a_domain_has_the_blocks_that_it_has_alone(tokenizer: Tokenizer) -> None:
    texts = {"a": ["the quick"] * 3, "b": ["brown fox the quick"] * 4}
    documents = {name: [Document(text, text) for text in texts[name]] for name in texts}
    both = build(documents, tokenizer, digest="d", cut=Cut(8))
    for code, name in enumerate(documents):
        alone = build({name: documents[name]}, tokenizer, digest="d", cut=Cut(8))
        mine = np.flatnonzero(both.domain == code)
        assert [both.block(int(i)).tolist() for i in mine] == [
            alone.block(i).tolist() for i in range(len(alone))
        ]
        assert both.bytes[mine].tolist() == alone.bytes.tolist()


def test_documents_of_two_domains_are_never_one_cluster(tokenizer: Tokenizer) -> None:
    documents = {name: [Document(name * 50, name)] for name in ("a", "b")}
    blocks = build(documents, tokenizer, digest="d", cut=Cut(8))
    of = {name: set(blocks.document[blocks.domain == code]) for code, name in enumerate(("a", "b"))}
    assert not of["a"] & of["b"]


def test_a_domain_with_nothing_to_predict_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(CorpusError, match="domain 'text' has 0 documents to score"):
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


def test_a_tokenizer_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="cannot be loaded"):
        load_tokenizer(FolderStore(tmp_path))


@pytest.mark.parametrize(
    ("special", "separator"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
        ({"eos_token": "</s>"}, "</s>"),
        ({}, None),
    ],
)
def test_documents_are_separated_by_the_first_token_that_the_tokenizer_has(
    tmp_path: Path, special: dict[str, str], separator: str | None
) -> None:
    write_tokenizer(tmp_path, **special)
    raw = Tokenizers.from_file(str(tmp_path / "tokenizer.json"))
    expected = None if separator is None else raw.token_to_id(separator)
    assert load_tokenizer(FolderStore(tmp_path)).separator == expected


def test_a_tokenizers_digest_is_of_its_files_and_of_no_others(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a", bos_token="<s>")
    write_tokenizer(tmp_path / "b", bos_token="<s>")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"weights")
    write_tokenizer(tmp_path / "c", bos_token="<x>")
    digests = [load_tokenizer(FolderStore(tmp_path / name)).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_everything_that_decides_the_blocks_names_them() -> None:
    usual = {"corpus": "c", "tokenizer": "t", "split": "audit", "cut": Cut(8)}
    changes = [{}, {"corpus": "d"}, {"tokenizer": "u"}, {"split": "report"}, {"cut": Cut(9)},
               {"cut": Cut(8, bos="none")}, {"cut": Cut(8, stride=3)},
               {"cut": Cut(8, layout="rolling")}]  # fmt: skip
    assert len({block_digest(**{**usual, **change}) for change in changes}) == 8  # type: ignore[arg-type]
