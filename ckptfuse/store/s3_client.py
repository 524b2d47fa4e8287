"""boto3's client, made at first use, and its errors in our words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ckptfuse.errors import ConfigurationError, MissingFile, StoreError

#: Connections that are kept open: as many requests can be in flight without new handshakes.
CONNECTIONS = 64


@lru_cache(maxsize=1)
def client() -> Any:
    """The process's client; endpoint, region and credentials come from the AWS settings."""
    import boto3
    from botocore.config import Config

    # Checksums only where required: several S3-compatible stores answer ranged reads without one.
    retries: dict[str, object] = {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:  # what is given here would stand over it
        retries["max_attempts"] = 5
    config = Config(
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        retries=retries,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.Session().client("s3", config=config)


@contextmanager
def explained(where: str, bucket: str) -> Iterator[None]:
    """Turn botocore's many exceptions into ours, with what a person can do."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise ConfigurationError(
            f"{where}: no usable AWS credentials ({error}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or run with an instance role"
        ) from error
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        raise _client_error(where, bucket, code, error) from error
    except ParamValidationError as error:
        if "Invalid bucket name" not in str(error):
            raise StoreError(f"{where}: {' '.join(str(error).split())}") from error
        raise ConfigurationError(
            f"{where}: {bucket!r} is no valid name of an S3 bucket (letters, digits, '.', '-' and "
            "'_'); correct the URI"
        ) from error
    except BotoCoreError as error:
        raise StoreError(
            f"{where}: {error}; is AWS_ENDPOINT_URL right and the store up?"
        ) from error


def _client_error(where: str, bucket: str, code: str, error: Exception) -> StoreError:
    if code == "NoSuchBucket":
        return StoreError(f"{where}: the bucket {bucket!r} does not exist")
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingFile(f"{where}: no such object")
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return StoreError(f"{where}: access denied ({code}); check the AWS credentials and policy")
    return StoreError(f"{where}: {error}")
