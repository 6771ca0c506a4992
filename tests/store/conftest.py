from __future__ import annotations

from collections.abc import Iterator

import pytest
from kits.s3_servers import (
    ACCESS_KEY,
    SECRET_KEY,
    S3Server,
    moto_server,
    rclone_server,
    scratch_root,
)


@pytest.fixture(scope="session")
def rclone() -> Iterator[S3Server]:
    with scratch_root() as root, rclone_server(root) as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with scratch_root() as root, moto_server(root) as server:
        yield server


@pytest.fixture
def aws_keys(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Credentials for the test servers by the environment, and nothing of the host's own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
