"""The table of naming conventions, and patterns of a team's own."""

import pytest

from ckptfuse.errors import ConfigurationError
from ckptfuse.names import ParsedName, check_pattern, parse_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("checkpoint-1000", ParsedName(1000)),  # Hugging Face Trainer
        ("step1000-tokens4B", ParsedName(1000, tokens=4_000_000_000)),  # OLMo
        ("stage1-step1000-tokens4B", ParsedName(1000, "stage1", 4_000_000_000)),
        ("stage2-step500-tokens0.5T", ParsedName(500, "stage2", 500_000_000_000)),
        ("step-7-tokens2.5M", ParsedName(7, tokens=2_500_000)),
        ("step7-tokens12345", ParsedName(7, tokens=12_345)),
        ("step1000", ParsedName(1000)),  # OLMo-core
        ("stage1-step1000", ParsedName(1000, "stage1")),
        ("step1000-unsharded", ParsedName(1000)),
        ("step1000-hf", ParsedName(1000)),
        ("step-1000", ParsedName(1000)),  # torchtitan
        ("step_1000", ParsedName(1000)),
        ("iter_0001000", ParsedName(1000)),  # Megatron-LM
        ("global_step1000", ParsedName(1000)),  # DeepSpeed, GPT-NeoX
        ("global_step_1000", ParsedName(1000)),
        ("ckpt_100", ParsedName(100)),
        ("ckpt-100", ParsedName(100)),
        ("ckpt100", ParsedName(100)),
        ("model_000100", ParsedName(100)),  # nanochat
        ("checkpoint_100", ParsedName(100)),
        ("0001000", ParsedName(1000)),
    ],
)
def test_a_name_of_the_field_gives_step_stage_and_tokens(name: str, expected: ParsedName) -> None:
    assert parse_name(name) == expected


@pytest.mark.parametrize(
    "name",
    ["", "final", "checkpoint", "checkpoint-", "checkpoint-1000-old", "my-checkpoint-1000",
     "step1000.tmp", "step\u0661\u0660", f"step{2**63}",
     "checkpoint--5", "step1e3", "tokenizer", "runs", "1000 "],
)  # fmt: skip
def test_another_name_is_no_checkpoints(name: str) -> None:
    assert parse_name(name) is None


def test_a_pattern_of_the_users_own_replaces_the_table() -> None:
    pattern = r"run7@(?P<step>\d+)(?:-(?P<stage>warm|cold))?"
    assert parse_name("run7@250-cold", pattern) == ParsedName(250, "cold")
    assert parse_name("run7@250", pattern) == ParsedName(250)
    assert parse_name("checkpoint-250", pattern) is None
    assert parse_name("old-run7@250", pattern) is None


def test_a_unit_of_the_users_own_may_be_written_small() -> None:
    pattern = r"(?P<step>\d+)-(?P<tokens>\d+)(?P<unit>[kmbt])"
    assert parse_name("10-4b", pattern) == ParsedName(10, tokens=4_000_000_000)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("run-final", r"run-(?P<step>\w+)"),
        ("run", r"run(?:-(?P<step>\d+))?"),
        ("run-10-4Q", r"run-(?P<step>\d+)-(?P<tokens>\d+)(?P<unit>[A-Z])"),
        ("run-10-x", r"run-(?P<step>\d+)-(?P<tokens>\w+)"),
    ],
)
def test_what_a_wide_pattern_catches_without_numbers_is_no_checkpoint(
    name: str, pattern: str
) -> None:
    assert parse_name(name, pattern) is None


@pytest.mark.parametrize(
    ("pattern", "said"),
    [(r"step(\d+)", r"no group \(\?P<step>"), (r"(?P<step>\d+", "no regular expression")],
)
def test_an_unusable_pattern_is_refused_before_it_is_used(pattern: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        check_pattern(pattern)


def test_a_usable_pattern_is_returned_as_it_is() -> None:
    assert check_pattern(r"x(?P<step>\d+)") == r"x(?P<step>\d+)"
