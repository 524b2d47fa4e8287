"""The first tokens of a long text: exactly those of the whole, from as little as it takes."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Tokenizers
from transformers import PreTrainedTokenizerFast

from ckptfuse.store import FolderStore
from ckptfuse.tokenizing import Encoded, Tokenizer, encode, load_tokenizer

CHANCE = random.Random(0)


def mixed(parts: list[str], count: int, between: str = " ") -> str:
    return between.join(CHANCE.choices(parts, k=count))


ENGLISH = ["the", "quick", "fox's", "jumped,", "over", "12345", "naïve", "\n\n", "  x", "</s>", "a"]
CHINESE = ["合併", "檢查點", "的", "困惑度", "決定權重", ",", "。", "在保留的文本上"]
TEXTS = {
    "words": mixed(ENGLISH, 6_000),
    "code": mixed(["if x:", "    return y\n", "\t\t", "x += 1\n", "\r\n", "#" * 70], 6_000, ""),
    "letters without white space": mixed(list("abcdefgh"), 12_000, ""),
    "one letter": "a" * 12_001,
    "digits without white space": mixed(list("0123456789"), 12_000, ""),
    "digits in words": mixed([mixed(list("0123456789"), n, "") for n in (1, 5, 100, 999)], 300),
    "chinese": mixed(CHINESE, 4_000, ""),
    "chinese in lines": mixed([*CHINESE, "\n"], 4_000, ""),
    "emoji": mixed(["🙂", "👩‍👩‍👧", "é", "e\u0301", " ", "🇫🇷"], 4_000, ""),
    "mostly white space": mixed([" " * 300, "\n" * 40, "word", "\t\t"], 2_000),
    "nothing but white space": " \n" * 4_000,
}


def bpe() -> Tokenizers:
    return Tokenizers(models.BPE(unk_token="<unk>"))


def byte_level(regex: str | None = None) -> Tokenizers:
    raw = bpe()
    split = pre_tokenizers.Split(Regex(regex), "isolated") if regex else None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    return raw


def metaspace(raw: Tokenizers, *, split: bool) -> Tokenizers:
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    return raw


def of_words() -> Tokenizers:
    raw = Tokenizers(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return raw


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS_FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*(?!\d))|[^\s\d]+|\s+"
IN_PIECES: dict[str, Callable[[], Tokenizers]] = {
    "byte-level": byte_level,
    "byte-level as llama 3": lambda: byte_level(LLAMA_3),
    "byte-level, digits from the right": lambda: byte_level(DIGITS_FROM_THE_RIGHT),
    "metaspace": lambda: metaspace(bpe(), split=True),
    "metaspace, unigram": lambda: metaspace(Tokenizers(models.Unigram()), split=True),
    "wordpiece": of_words,
}
AS_ONE: dict[str, Callable[[], Tokenizers]] = {
    "metaspace, unsplit": lambda: metaspace(bpe(), split=False),
    "metaspace, unsplit unigram": lambda: metaspace(Tokenizers(models.Unigram()), split=False),
}


def trained(make: Callable[[], Tokenizers], folder: Path) -> Tokenizer:
    raw = make()
    kind = {
        "BPE": trainers.BpeTrainer,
        "Unigram": trainers.UnigramTrainer,
        "WordPiece": trainers.WordPieceTrainer,
    }[type(raw.model).__name__]
    special = ["<unk>", "</s>"]
    options = {"unk_token": "<unk>"} if kind is trainers.UnigramTrainer else {}
    trainer = kind(vocab_size=500, special_tokens=special, show_progress=False, **options)
    raw.train_from_iterator([text[:3_000] for text in TEXTS.values()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    return load_tokenizer(FolderStore(folder))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    makers = IN_PIECES | AS_ONE
    return {name: trained(make, folder / name) for name, make in makers.items()}


@pytest.mark.parametrize("name", IN_PIECES | AS_ONE)
@pytest.mark.parametrize("kind", TEXTS)
def test_the_first_tokens_and_their_bytes_are_those_of_the_whole_text(
    tokenizers: dict[str, Tokenizer], name: str, kind: str
) -> None:
    text, tokenizer = TEXTS[kind], tokenizers[name]
    ids, sizes = encode(text, tokenizer)
    assert sizes.sum() == (len(text.encode()) if ids else 0)
    for most in (0, 1, 2, 30, 31, 32, 500, 2_000, len(ids), len(ids) + 1):
        first, sizes_of_first = encode(text, tokenizer, most)
        assert first == ids[:most]
        assert sizes_of_first.tolist() == sizes[:most].tolist()


def watched(tokenizer: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and the lengths of what it is given from now on."""
    lengths: list[int] = []

    def encode(text: str) -> Encoded:
        lengths.append(len(text))
        return tokenizer.encode(text)

    return replace(tokenizer, encode=encode), lengths


@pytest.mark.parametrize("name", IN_PIECES)
def test_of_a_long_text_only_a_beginning_is_tokenised(
    tokenizers: dict[str, Tokenizer], name: str
) -> None:
    tokenizer, lengths = watched(tokenizers[name])
    encode(TEXTS["words"], tokenizer, 200)
    assert sum(lengths) < len(TEXTS["words"]) / 5


@pytest.mark.parametrize("name", AS_ONE)
def test_a_text_that_is_one_piece_to_its_tokenizer_is_tokenised_whole(
    tokenizers: dict[str, Tokenizer], name: str
) -> None:
    tokenizer, lengths = watched(tokenizers[name])
    encode(TEXTS["code"], tokenizer, 200)
    assert lengths[-1] == len(TEXTS["code"])


def test_a_tokenizer_without_offsets_sees_all_text_since_bytes_are_spread_over_it(
    tokenizers: dict[str, Tokenizer],
) -> None:
    fast = tokenizers["byte-level"]
    slow = replace(fast, encode=lambda text: Encoded(fast.encode(text).ids, None, None))
    ids, sizes = encode(TEXTS["code"], slow)
    first, sizes_of_first = encode(TEXTS["code"], slow, 100)
    assert (first, sizes_of_first.tolist()) == (ids[:100], sizes[:100].tolist())
