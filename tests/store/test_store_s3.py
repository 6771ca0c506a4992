"""The contract on S3 servers that nobody here wrote."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import pytest
from kits.s3_servers import BUCKET, S3Server, plain_client
from kits.store_contract import StoreContract, Subject

from imagecache.store.open import open_store


@pytest.mark.usefixtures("aws_keys")
class TestRcloneStore(StoreContract):
    @pytest.fixture
    async def subject(self, rclone: S3Server) -> AsyncIterator[Subject]:
        prefix = secrets.token_hex(8)
        opened = open_store(rclone.url(prefix))
        assert rclone.directory is not None
        root = rclone.directory / prefix

        async def seed(key: str, body: bytes) -> None:
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(body)

        async def peek(key: str) -> bytes | None:
            return (root / key).read_bytes() if (root / key).exists() else None

        yield Subject(opened.store, opened.reader, seed, peek, atomic=False)
        await opened.close()


@pytest.mark.usefixtures("aws_keys")
class TestMotoStore(StoreContract):
    @pytest.fixture
    async def subject(self, moto: S3Server) -> AsyncIterator[Subject]:
        prefix = secrets.token_hex(8)
        opened = open_store(moto.url(prefix))
        client = plain_client(moto)

        def put(key: str, body: bytes) -> None:
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=body)

        def get(key: str) -> bytes | None:
            try:
                return client.get_object(Bucket=BUCKET, Key=f"{prefix}/{key}")["Body"].read()
            except client.exceptions.NoSuchKey:
                return None

        async def seed(key: str, body: bytes) -> None:
            await asyncio.to_thread(put, key, body)

        async def peek(key: str) -> bytes | None:
            return await asyncio.to_thread(get, key)

        yield Subject(opened.store, opened.reader, seed, peek)
        await opened.close()
        await asyncio.to_thread(client.close)
