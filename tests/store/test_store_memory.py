from __future__ import annotations

import pytest
from kits.store_contract import StoreContract, Subject

from imagecache.store.memory import MemoryReader, MemoryStore

pytestmark = pytest.mark.quick


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def subject(self) -> Subject:
        store = MemoryStore()

        async def seed(key: str, body: bytes) -> None:
            await store.put(key, body)

        async def peek(key: str) -> bytes | None:
            return store.objects.get(key)

        return Subject(store, MemoryReader(store), seed, peek)
