"""S3-compatible storage: videos, posters, manifests and input images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from jobs.client import QUICK_SECONDS
from jobs.errors import StorageRefused, StorageUnavailable
from jobs.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

PART_BYTES = 16 * 2**20  # multipart above this; S3's smallest part is 5 MiB
MISSING = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchBucket"})
REFUSED = frozenset({"AccessDenied", "NotImplemented", "MethodNotAllowed"})
REFUSED_STATUS = frozenset({403, 405, 501})


@dataclass(frozen=True)
class ObjectHead:
    """What storage knows of an object without its bytes."""

    key: str
    bytes: int
    content_type: str
    etag: str


def artifact_key(job_id: str, token: int, name: str) -> str:
    """Where one attempt puts a file: a stale attempt's files never overwrite the committed ones."""
    return f"jobs/{job_id}/{token}/{name}"


class ObjectStore:
    """One bucket. Safe to share between threads. Methods raise StorageUnavailable when S3 can't be used, and
    StorageRefused, which is one, when it understood and won't.

    quick: a request is tried once and waited for QUICK_SECONDS at most, for a caller that looks again itself.
    """

    def __init__(self, settings: Settings, *, quick: bool = False) -> None:
        self.settings = settings
        self.bucket = settings.s3_bucket
        self._client = _client(settings, settings.s3_endpoint, quick)
        public = settings.s3_public_endpoint or settings.s3_endpoint
        self._signer = self._client if public == settings.s3_endpoint else _client(settings, public, quick)
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4
        )

    def ensure_bucket(self, origins: tuple[str, ...] = ("*",)) -> None:
        """Make the bucket if it is missing, and let pages of `origins` play videos from it (CORS)."""
        with self._guard("open the bucket"):
            if not self._exists_bucket():
                self._create_bucket()
            self._client.put_bucket_cors(
                Bucket=self.bucket,
                CORSConfiguration={
                    "CORSRules": [
                        {
                            "AllowedOrigins": list(origins),
                            "AllowedMethods": ["GET", "HEAD"],
                            "AllowedHeaders": ["*"],
                            "ExposeHeaders": ["Content-Length", "Content-Range", "Accept-Ranges", "ETag"],
                            "MaxAgeSeconds": 3600,
                        }
                    ]
                },
            )

    def ready(self) -> bool:
        """Whether the bucket answers. Raises StorageUnavailable when S3 can't be reached at all."""
        with self._guard("look at the bucket"):
            return self._exists_bucket()

    def put_file(self, key: str, path: Path, content_type: str) -> int:
        """Upload a file, in parts when large (a failed multipart upload is aborted). Returns its bytes."""
        with self._guard(f"upload {key}"):
            self._client.upload_file(
                str(path), self.bucket, key, ExtraArgs={"ContentType": content_type}, Config=self._transfer
            )
        return path.stat().st_size

    def put_bytes(self, key: str, data: bytes, content_type: str) -> None:
        """Upload a small object."""
        with self._guard(f"upload {key}"):
            self._client.put_object(Bucket=self.bucket, Key=key, Body=data, ContentType=content_type)

    def get_bytes(self, key: str) -> bytes:
        """A small object's bytes. Raises FileNotFoundError when there is none."""
        with self._guard(f"read {key}"):
            return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def get_file(self, key: str, path: Path) -> None:
        """Download to `path`. Raises FileNotFoundError when there is no such object."""
        with self._guard(f"download {key}"):
            self._client.download_file(self.bucket, key, str(path), Config=self._transfer)

    def head(self, key: str) -> ObjectHead | None:
        """What is stored under `key`, or None."""
        try:
            with self._guard(f"look at {key}"):
                found = self._client.head_object(Bucket=self.bucket, Key=key)
        except FileNotFoundError:
            return None
        return ObjectHead(key, found["ContentLength"], found.get("ContentType", ""), found["ETag"].strip('"'))

    def presign_get(self, key: str, seconds: int | None = None, download_name: str | None = None) -> str:
        """A URL, signed for the public endpoint, that reads `key` for `seconds` (None: the settings').

        download_name: what a browser saves it as; None: shown in place. Nothing is sent.
        """
        params: dict[str, Any] = {"Bucket": self.bucket, "Key": key}
        if download_name:
            params["ResponseContentDisposition"] = f"attachment; filename*=UTF-8''{quote(download_name)}"
        with self._guard(f"sign {key}"):
            return self._signer.generate_presigned_url(
                "get_object", Params=params, ExpiresIn=seconds or self.settings.presign_seconds
            )

    def delete(self, key: str) -> None:
        """Remove one object; nothing happens when there is none."""
        with self._guard(f"delete {key}"):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def delete_prefix(self, prefix: str) -> int:
        """Remove every object under `prefix` and abort unfinished uploads there. Returns how many went.

        Raises ValueError for a prefix without a slash: it would take more than one job's files.
        """
        if "/" not in prefix.rstrip("/"):
            raise ValueError(f"got prefix {prefix!r}, expected something like 'jobs/<id>/'")
        removed = 0
        with self._guard(f"delete {prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix
            ):
                for found in page.get("Contents", []):
                    self._client.delete_object(Bucket=self.bucket, Key=found["Key"])
                    removed += 1
            for upload in self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=prefix).get(
                "Uploads", []
            ):
                self._client.abort_multipart_upload(
                    Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
        return removed

    def list_keys(self, prefix: str) -> list[str]:
        """Every key under `prefix`, in order."""
        keys: list[str] = []
        with self._guard(f"list {prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix
            ):
                keys += [found["Key"] for found in page.get("Contents", [])]
        return keys

    def _exists_bucket(self) -> bool:
        try:
            # not HEAD, which needs rights on the whole bucket: a node's user has some of its folders alone
            self._client.list_objects_v2(Bucket=self.bucket, Prefix="jobs/", MaxKeys=1)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in MISSING:
                return False
            raise
        return True

    def _create_bucket(self) -> None:
        region = self.settings.s3_region
        if self.settings.s3_endpoint is None and region != "us-east-1":
            where: Any = {"LocationConstraint": region}
            self._client.create_bucket(Bucket=self.bucket, CreateBucketConfiguration=where)
        else:
            self._client.create_bucket(Bucket=self.bucket)

    @contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """One clear error for every way that S3 can fail; FileNotFoundError for a missing object."""
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in MISSING:
                raise FileNotFoundError(f"could not {what}: storage has no such object") from error
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            kind = StorageRefused if code in REFUSED or status in REFUSED_STATUS else StorageUnavailable
            raise kind(self._where(what, f"it answered {code or error}")) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StorageUnavailable(self._where(what, str(error))) from error

    def _where(self, what: str, why: str) -> str:
        place = self.settings.s3_endpoint or f"AWS S3 in {self.settings.s3_region}"
        return (
            f"could not {what} in bucket {self.bucket} at {place}: {why}; "
            "check REEL_S3_ENDPOINT, REEL_S3_ACCESS_KEY and REEL_S3_SECRET_KEY"
        )


def _client(settings: Settings, endpoint: str | None, quick: bool) -> "S3Client":
    secret = settings.s3_secret_key.get_secret_value() if settings.s3_secret_key else None
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=secret,
        config=Config(
            signature_version="s3v4",
            connect_timeout=QUICK_SECONDS if quick else 5,
            read_timeout=QUICK_SECONDS if quick else 30,
            retries={"total_max_attempts": 1 if quick else 5, "mode": "standard"},
            max_pool_connections=16,
            # a custom endpoint rarely has wildcard DNS for its buckets
            s3={"addressing_style": "path" if endpoint else "auto"},
            # the newer default adds trailing checksums, which some S3-compatible servers refuse
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
