"""What the exports of one image need of it besides its map, loaded once however many ask."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from imagecache.catalog import Catalog
from imagecache.profile.prepare import ImageNames, LoadedImage, load_image
from imagecache.profile.starts import GetSealed

T = TypeVar("T")
Key = tuple[str, str, int]
KEPT_PREDICTIONS = 16


def _key(names: ImageNames) -> Key:
    return names.block_image, names.locations, names.generation


class SharedLoads:
    """Images and predictions by name. A hundred exports of one image load and predict once.

    An image is kept while somebody uses it; of predictions, the last ones are. What is under way
    outlives whoever asked first, and ends by itself.
    """

    def __init__(self, catalog: Catalog, get_sealed: GetSealed) -> None:
        self._catalog = catalog
        self._get_sealed = get_sealed
        self._images: WeakValueDictionary[Key, LoadedImage] = WeakValueDictionary()
        self._loading: dict[Key, asyncio.Task[LoadedImage]] = {}
        self._predicting: dict[Key, asyncio.Task[tuple[int, ...]]] = {}
        self._predicted: OrderedDict[Key, tuple[int, ...]] = OrderedDict()

    async def image(self, names: ImageNames) -> LoadedImage:
        """An image's files and chunks; raises what the store answers."""
        found = self._images.get(_key(names))
        if found is None:
            found = await _joined(
                self._loading,
                _key(names),
                lambda: load_image(self._catalog, names, self._get_sealed),
            )
            self._images[_key(names)] = found
        return found

    async def prediction(
        self, names: ImageNames, make: Callable[[], Awaitable[tuple[int, ...]]]
    ) -> tuple[int, ...]:
        """The chunks that an image's start is likely to read, in order, as `make` finds them."""
        key = _key(names)
        if key not in self._predicted:
            found = await _joined(self._predicting, key, make)
            self._predicted[key] = found
            while len(self._predicted) > KEPT_PREDICTIONS:
                self._predicted.popitem(last=False)
            return found
        return self._predicted[key]

    async def close(self) -> None:
        """Ends what is under way."""
        tasks = [*self._loading.values(), *self._predicting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _joined(
    under_way: dict[Key, asyncio.Task[T]], key: Key, make: Callable[[], Awaitable[T]]
) -> T:
    task = under_way.get(key)
    if task is None:

        async def run() -> T:
            return await make()

        task = under_way[key] = asyncio.get_running_loop().create_task(run())

        def done(ended: asyncio.Task[T]) -> None:
            under_way.pop(key, None)
            # Whoever waits is told; without anybody to tell, nobody misses it.
            _ = ended.cancelled() or ended.exception()

        task.add_done_callback(done)
    return await asyncio.shield(task)
