"""Fixtures for the tests of images in."""

from __future__ import annotations

import base64
import json
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from kits.registry_process import PASSWORD, USER, RegistryProcess
from kits.registry_server import ScriptedServer

from imagecache.oci.reference import parse_reference
from imagecache.oci.registry import RegistrySource
from imagecache.oci.settings import RegistryLimits, RegistrySettings


@pytest.fixture
def limits():
    """The production limits with short waits."""
    return RegistryLimits(
        backoff_seconds=0.001,
        backoff_cap_seconds=0.005,
        retry_after_cap_seconds=0.05,
        connect_seconds=5,
        head_seconds=5,
        small_seconds=20,
        blob_base_seconds=60,
        helper_seconds=10,
    )


@pytest.fixture
def settings(limits):
    return RegistrySettings(limits=limits)


@pytest.fixture
async def server():
    async with ScriptedServer() as running:
        yield running


@pytest.fixture
async def other_server():
    async with ScriptedServer() as running:
        yield running


@pytest.fixture
def source(server, settings):
    """`async with source(text, **changes to the settings) as s`: a source for `server`."""

    @asynccontextmanager
    async def opened(name="app:v1", *, resolver=None, host=None, **changes):
        reference = parse_reference(f"{host or server.host}/{name}")
        made = RegistrySource(reference, replace(settings, **changes), resolver=resolver)
        try:
            yield made
        finally:
            await made.close()

    return opened


@pytest.fixture
def docker_config(tmp_path):
    """Write a docker config with credentials for a host; returns its path."""

    def write(host, user=USER, password=PASSWORD, **more):
        auth = base64.b64encode(f"{user}:{password}".encode()).decode()
        path = tmp_path / "docker-config.json"
        path.write_text(json.dumps({"auths": {host: {"auth": auth} | more}}))
        return path

    return write


@pytest.fixture(scope="session")
def registry(tmp_path_factory):
    with RegistryProcess(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def guarded_registry(tmp_path_factory):
    with RegistryProcess(tmp_path_factory.mktemp("registry-auth"), auth=True) as running:
        yield running
