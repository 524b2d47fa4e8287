"""The trainer's bucket: can it be read, is it safe from us, is its clock ours?

That nothing can be written there is found out without writing:

S3       an upload in parts is begun under a name that nobody has, and given up at once. To begin
         one needs the right to write (``s3:PutObject``), yet no object comes to be, no version and
         no event. To delete is not tried: there is no way that is sure to leave no trace.
folder   the kernel is asked (``access``), and nothing is tried
"""

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from ckptfuse.checkpoints import check_bucket_uri, is_identity
from ckptfuse.checks.check import Check, failed, ok, warning
from ckptfuse.checks.clock import compare_clocks
from ckptfuse.names import parse_name
from ckptfuse.params import Params
from ckptfuse.store import Entry, FolderStore, S3Store, Store, open_store
from ckptfuse.store.s3_client import client, explained

READING, WRITING, CLOCK = "bucket is read", "bucket is not written", "clock of the bucket"
_REFUSED = (401, 403, 405)
_READ_ONLY = (
    "give the service credentials that may list and read only (s3:ListBucket, s3:GetObject)"
)


@dataclass(frozen=True, slots=True)
class Found:
    """What the bucket holds."""

    bucket: Store
    files: int
    checkpoints: dict[str, list[Entry]]  # folders with a checkpoint's name -> files

    @property
    def newest(self) -> str | None:
        """The checkpoint whose files were written last."""
        times = {name: max(e.modified for e in files) for name, files in self.checkpoints.items()}
        return max(times, key=lambda name: times[name], default=None)

    @property
    def size(self) -> int | None:
        """Bytes of the newest one's model: what a merge writes."""
        if self.newest is None:
            return None
        return sum(e.size for e in self.checkpoints[self.newest] if is_identity(e.path))


def look(params: Params) -> Found:
    """List the bucket; raises StoreError and ConfigurationError."""
    bucket = open_store(check_bucket_uri(params.bucket))
    listed = bucket.list()
    checkpoints: dict[str, list[Entry]] = {}
    for entry in listed:
        name, _, path = entry.path.partition("/")
        if path and parse_name(name, params.watch.pattern) is not None:
            inside = Entry(path, entry.size, entry.version, entry.modified)
            checkpoints.setdefault(name, []).append(inside)
    return Found(bucket, len(listed), checkpoints)


def reading(found: Found) -> Check:
    """Listing is one right, reading another: a byte of the newest checkpoint is read."""
    if found.newest is None:
        return warning(
            READING,
            f"{found.bucket.uri} holds {found.files} files, none in a folder with a checkpoint's "
            "name",
            "wait for the trainer's first, or set watch.pattern to how it names its folders",
        )
    largest = max(found.checkpoints[found.newest], key=lambda entry: entry.size)
    if largest.size:
        found.bucket.child(found.newest).read_range(largest.path, largest.size - 1, 1)
    return ok(
        READING,
        f"{found.bucket.uri} holds {len(found.checkpoints)} checkpoints; the last byte of "
        f"{found.newest}/{largest.path} was read",
    )


def writing(bucket: Store) -> Check:
    if isinstance(bucket, S3Store):
        return _writing_to_s3(bucket)
    assert isinstance(bucket, FolderStore)
    return _writing_to_folder(bucket.root)


def _writing_to_folder(folder: Path) -> Check:
    if not os.access(folder, os.W_OK):
        return ok(WRITING, f"this user may not write to {folder} (asked, not tried)")
    who = "root may write everywhere" if os.geteuid() == 0 else "this user may write there"
    return warning(
        WRITING,
        f"{folder} is safe from the service by its own discipline alone: {who}",
        "run the service as a user without the right to write there, or mount it read-only",
    )


def _writing_to_s3(bucket: S3Store) -> Check:
    from botocore.exceptions import ClientError

    key = f"{bucket.prefix}.ckptfuse-doctor-{uuid.uuid4().hex}"
    with explained(bucket.uri, bucket.bucket):
        try:
            begun = client().create_multipart_upload(Bucket=bucket.bucket, Key=key)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in _REFUSED:
                return ok(WRITING, f"{bucket.uri} refused to begin an upload ({status})")
            return warning(
                WRITING,
                f"whether {bucket.uri} can be written was not found out: {error}",
                _READ_ONLY,
            )
    try:
        client().abort_multipart_upload(Bucket=bucket.bucket, Key=key, UploadId=begun["UploadId"])
    except ClientError as error:
        return failed(
            WRITING,
            f"{bucket.uri} let an upload begin and not be given up: one without any part is left "
            f"under {key} ({error})",
            f"aws s3api abort-multipart-upload --bucket {bucket.bucket} --key {key} --upload-id "
            f"{begun['UploadId']}; then {_READ_ONLY}",
        )
    return warning(
        WRITING,
        f"{bucket.uri} let an upload begin (it was given up at once, no object came to be): the "
        "bucket is safe from the service by its own discipline alone",
        _READ_ONLY,
    )


def clock(bucket: Store) -> Check:
    """An S3 server's clock dates its objects; a folder's is this machine's or its file server's."""
    if not isinstance(bucket, S3Store):
        return ok(CLOCK, "files in a folder are dated by this machine or by its file server")
    from botocore.exceptions import ClientError

    asked = time.time()
    with explained(bucket.uri, bucket.bucket):
        try:
            answer = client().head_bucket(Bucket=bucket.bucket)
        except ClientError as error:  # refused answers are dated too
            answer = error.response
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return compare_clocks(CLOCK, headers.get("date"), asked=asked, answered=time.time())
