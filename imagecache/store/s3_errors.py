"""botocore's errors as ours: the one table of the S3 store."""

from __future__ import annotations

import time
from typing import Any

from botocore import exceptions as boto
from urllib3 import exceptions as urllib3

from imagecache.errors import Denied, NotFound, Unavailable
from imagecache.store.base import Throttled
from imagecache.store.policy import parse_retry_after

SKEW_CODES = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
CREDENTIAL_CODES = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidToken",
        "TokenRefreshRequired",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
    }
)
_SLOW_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
)
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.InvalidConfigError,
)
_WRITES = frozenset({"PutObject", "CompleteMultipartUpload", "UploadPart", "AbortMultipartUpload"})
_REMEDIES = {
    "ExpiredToken": "renew the session token",
    "InvalidAccessKeyId": "check the access key",
    "SignatureDoesNotMatch": "check the secret key and the region",
    "RequestTimeTooSkewed": "set this host's clock",
}


class AlreadyThere(Exception):
    """412: the conditional put found an object."""


class ConditionUnsupported(Exception):
    """The server does not know If-None-Match on a put."""


class NoSuchUpload(Exception):
    """404 for a multipart upload: finished by a call whose answer was lost, or aborted."""


def code_of(error: boto.ClientError) -> str:
    """The S3 error code, or the status as text where a HEAD had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: boto.ClientError) -> int:
    """The HTTP status, 0 where there was none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)


def header_of(error: boto.ClientError, name: str) -> str:
    """A response header by its lower-case name, or empty."""
    headers: dict[str, Any] = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get(name, ""))


def mapped(error: Exception, operation: str, what: str) -> Exception:
    """Our error for one of botocore's: `operation` is S3's name, `what` the object's."""
    if isinstance(error, boto.ClientError):
        return _of_answer(error, operation, what)
    if isinstance(error, _NO_CREDENTIALS):
        return Denied(
            f"no credentials for {what}: {error}",
            remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role",
        )
    if isinstance(error, boto.BotoCoreError | urllib3.HTTPError | OSError | ValueError):
        return Unavailable(f"{operation} of {what} failed: {str(error)[:300]}")
    return error


def _of_answer(error: boto.ClientError, operation: str, what: str) -> Exception:
    code, status = code_of(error), status_of(error)
    detail = str(error.response.get("Error", {}).get("Message", ""))[:200]
    says = f"{operation} of {what}: {code or status} {detail}".strip()
    if operation in _WRITES:
        if code == "NoSuchUpload":
            return NoSuchUpload(says)
        if status == 412 or code == "PreconditionFailed":
            return AlreadyThere(says)
        if status == 501 or code == "NotImplemented":
            return ConditionUnsupported(says)
    if code == "NoSuchBucket":
        return Unavailable(f"the bucket of {what} does not exist", remedy="create the bucket")
    if status == 404 or code in ("NoSuchKey", "404", "NotFound"):
        return NotFound(f"object {what} is not in the store")
    if status in (429, 503) or code in _SLOW_CODES:
        retry_after = parse_retry_after(header_of(error, "retry-after"), time.time())
        return Throttled(says, retry_after=retry_after)
    if status in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        region = header_of(error, "x-amz-bucket-region")
        remedy = f"set region={region} in the store URL" if region else "set the right region"
        return Denied(f"the bucket of {what} is in another region ({operation})", remedy=remedy)
    if status in (400, 401, 403, 405):
        remedy = _REMEDIES.get(code, f"allow {permission(operation)}")
        return Denied(f"{says} (refused)", remedy=remedy)
    return Unavailable(says)


def permission(operation: str) -> str:
    """The S3 permission that an operation needs, as a policy names it."""
    return {
        "HeadObject": "s3:GetObject",
        "GetObject": "s3:GetObject",
        "PutObject": "s3:PutObject",
        "CreateMultipartUpload": "s3:PutObject",
        "UploadPart": "s3:PutObject",
        "CompleteMultipartUpload": "s3:PutObject",
        "AbortMultipartUpload": "s3:AbortMultipartUpload",
        "DeleteObject": "s3:DeleteObject",
        "ListObjectsV2": "s3:ListBucket",
        "HeadBucket": "s3:ListBucket",
    }.get(operation, operation)
