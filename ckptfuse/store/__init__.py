"""Bytes at a URI: a folder or an S3 prefix behind one small protocol.

Everything above this package speaks of relative paths inside a store and never of a disk or a
bucket. Writes appear whole or not at all: a folder store renames a finished temporary file, and
S3 shows an object only when its (multipart) upload completes.

``protocol`` says what a store is; ``folder`` and ``s3`` are the two that there are (S3's client
in ``s3_client``, its uploads in ``multipart``); ``uris`` opens one; ``throttle`` caps reads.
boto3 is imported when an S3 store is first used.
"""

from ckptfuse.store.folder import TEMPORARY_PREFIX, FolderStore, link_file, link_tree, remove_folder
from ckptfuse.store.protocol import Entry, PartWriter, Reader, Store, Writer
from ckptfuse.store.s3 import S3Store
from ckptfuse.store.uris import absolute_uri, is_s3, local_path, open_store, read_uri, split_uri

__all__ = [
    "TEMPORARY_PREFIX",
    "Entry",
    "FolderStore",
    "PartWriter",
    "Reader",
    "S3Store",
    "Store",
    "Writer",
    "absolute_uri",
    "is_s3",
    "link_file",
    "link_tree",
    "local_path",
    "open_store",
    "read_uri",
    "remove_folder",
    "split_uri",
]
