"""From a URI to its store: a local path, ``file://`` or ``s3://``."""

from pathlib import Path
from urllib.parse import unquote

from ckptfuse.errors import ConfigurationError
from ckptfuse.store import throttle
from ckptfuse.store.folder import FolderStore
from ckptfuse.store.protocol import Store
from ckptfuse.store.s3 import S3Store

_FILE = "file://"


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def local_path(uri: str) -> Path:
    """The path that a local URI names: that of ``file:///a%20b`` is ``/a b``; a path is itself."""
    return Path(unquote(uri.removeprefix(_FILE)) if uri.startswith(_FILE) else uri)


def absolute_uri(uri: str) -> str:
    """The same place, named from anywhere: S3 URIs as they are, paths without ``file://``."""
    return uri if is_s3(uri) else str(local_path(uri).resolve())


def open_store(uri: str | Path) -> Store:
    """The store at a local path, ``file://`` or ``s3://`` URI; its reads keep to the caps."""
    text = str(uri)
    if is_s3(text):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigurationError(f"{text!r} names no bucket; expected s3://BUCKET/PREFIX")
        return S3Store(bucket, prefix.strip("/"), throttle.of(text))
    if "://" in text and not text.startswith(_FILE):
        raise ConfigurationError(f"{text!r}: unknown scheme; a local path or s3:// is accepted")
    path = local_path(text)
    return FolderStore(path, throttle.of(str(path)))


def split_uri(uri: str) -> tuple[str, str]:
    """A file's URI as (URI of its folder, name): ``s3://b/a/x.jsonl`` -> (``s3://b/a``, name)."""
    if uri.startswith(_FILE):
        uri = str(local_path(uri))
    parent, _, name = uri.rpartition("/")
    if is_s3(uri) and (parent == "s3:/" or not name):
        raise ConfigurationError(f"{uri!r} names no object; expected s3://BUCKET/KEY")
    return parent or ("/" if uri.startswith("/") else "."), name


def read_uri(uri: str) -> bytes:
    """The bytes of one file at a local path or S3 URI."""
    parent, name = split_uri(uri)
    return open_store(parent).read(name)
