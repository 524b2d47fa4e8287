"""params.yaml as plain values, where nothing of it is lost or meant otherwise than it is read."""

from pathlib import Path
from typing import Any

import yaml

from ckptfuse.errors import ConfigurationError

_MERGE = "tag:yaml.org,2002:merge"


def read_file(file: Path) -> dict[str, Any]:
    """The file's top-level mapping. Raises ConfigurationError with the line of what is wrong."""
    try:
        values = yaml.load(file.read_bytes(), _Loader) or {}  # noqa: S506 - it is a SafeLoader
    except _Unfit as error:
        raise ConfigurationError(f"{file}, line {error.line}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not (isinstance(values, dict) and all(isinstance(key, str) for key in values)):
        raise ConfigurationError(f"{file}: a mapping of sections was expected")
    return values


class _Unfit(Exception):
    """YAML that is right, and that we do not take."""

    def __init__(self, node: yaml.Node, said: str) -> None:
        super().__init__(said)
        self.line = node.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """YAML takes the last of two equal keys: a section would lose its first half unnoticed."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._seen: set[yaml.MappingNode] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if node not in self._seen:  # once merged (<<), it has keys of another beside its own
            self._seen.add(node)
            _check_keys(node)
        super().flatten_mapping(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if "\0" in value:  # no path, name or command can hold one
            raise _Unfit(node, "a NUL character (\\0) in a text; take it out")
        return value


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[Any, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if key.value in first:
            line = first[key.value].start_mark.line + 1
            raise _Unfit(
                key, f"{key.value!r} is given again, after line {line}; make one of the two"
            )
        first[key.value] = key
