"""What every journey stands on: servers on loopback, real images, an installation of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kits.image import recipe_layout, reference
from kits.journey import Cubecache
from testbed.processes import Stage
from testbed.servers import (
    ObjectStore,
    Registry,
    start_object_store,
    start_registry,
    store_environment,
)


@pytest.fixture(scope="session")
def servers() -> Iterator[Stage]:
    """The stage of the servers that all journeys share."""
    with Stage() as stage:
        yield stage


@pytest.fixture(scope="session")
def registry(servers: Stage) -> Registry:
    return start_registry(servers)


@pytest.fixture(scope="session")
def busybox() -> str:
    """The reference of a small image with every oddity."""
    return reference(recipe_layout("static-busybox"))


@pytest.fixture(scope="session")
def python_numpy() -> str:
    """The reference of the demo's image."""
    return reference(recipe_layout("python-numpy"))


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A stage that ends with the test."""
    with Stage() as stage:
        yield stage


@pytest.fixture
def object_store(stage: Stage) -> ObjectStore:
    return start_object_store(stage)


@pytest.fixture
def new_cubecache(stage: Stage, tmp_path: Path) -> Callable[..., Cubecache]:
    """Makes installations; each has its own empty state dir, and by default the embedded store."""
    made = 0

    def install(
        store: str | None = None, config: str | None = None, **environment: str
    ) -> Cubecache:
        nonlocal made
        made += 1
        # Unix socket paths are short, so not below pytest's long folder names.
        state = stage.folder / f"state-{made}"
        path = stage.folder / f"config-{made}.toml" if config is not None else None
        if path and config is not None:
            path.write_text(config)
        return Cubecache(stage, state, store, store_environment() | environment, path)

    return install


@pytest.fixture
def cubecache(new_cubecache: Callable[..., Cubecache]) -> Cubecache:
    return new_cubecache()
