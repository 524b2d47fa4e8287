"""What folder names of the field say."""

import pytest

from ckptfuse.errors import ConfigurationError
from ckptfuse.names import ParsedName, check_pattern, parse_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("checkpoint-1000", ParsedName(1000)),
        ("step1000-tokens4B", ParsedName(1000, tokens=4_000_000_000)),
        ("step-1000-tokens4B", ParsedName(1000, tokens=4_000_000_000)),
        ("step500-tokens2.5M", ParsedName(500, tokens=2_500_000)),
        ("stage1-step1000-tokens4B", ParsedName(1000, stage="stage1", tokens=4_000_000_000)),
        ("stage2-step20", ParsedName(20, stage="stage2")),
        ("step7000-unsharded", ParsedName(7000)),
        ("step7000-hf", ParsedName(7000)),
        ("step-12", ParsedName(12)),
        ("iter_0001000", ParsedName(1000)),
        ("global_step1000", ParsedName(1000)),
        ("global_step_1000", ParsedName(1000)),
        ("ckpt_100", ParsedName(100)),
        ("model_000100", ParsedName(100)),
        ("0001000", ParsedName(1000)),
    ],
)
def test_the_conventions_of_the_field_are_known(name: str, expected: ParsedName) -> None:
    assert parse_name(name) == expected


@pytest.mark.parametrize(
    "name",
    ["runs", "checkpoint-", "checkpoint-best", "step10-old", "tmp-checkpoint-10", ""],
)
def test_other_folders_are_no_checkpoints(name: str) -> None:
    assert parse_name(name) is None


def test_a_pattern_of_ones_own_replaces_the_table() -> None:
    pattern = r"(?P<stage>warm|main)/?_at_(?P<step>\d+)"
    assert parse_name("main_at_7", pattern) == ParsedName(7, stage="main")
    assert parse_name("checkpoint-7", pattern) is None


@pytest.mark.parametrize(("pattern", "said"), [("(", "no regular expression"), ("x", "no group")])
def test_a_pattern_that_cannot_work_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        check_pattern(pattern)
