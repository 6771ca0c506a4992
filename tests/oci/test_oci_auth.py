"""Authorization against a scripted registry and token server."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime

import pytest
from kits.oci_images import make_image
from kits.registry_server import Reply
from yarl import URL

from imagecache.errors import Denied, LimitExceeded, Rejected, Unavailable
from imagecache.oci.challenge import parse_challenges, parse_token, retry_delay
from imagecache.oci.credentials import Credentials, docker_config_path, find_credentials
from imagecache.oci.origin import Origin, check_realm, origin_of
from imagecache.oci.platform import Platform
from imagecache.oci.settings import RegistrySettings

AMD64 = Platform("linux", "amd64")


def guard(server, *, accept=None, challenge=None, token_reply=None, image=None):
    """Put a bearer check before every route of an image, and a token endpoint at /token."""
    image = image or make_image()
    server.add_image(image)
    issued = []

    def checked(handler):
        def answer(request):
            given = request.headers.get("authorization", "")
            good = accept(given) if accept else given in {f"Bearer {t}" for t in issued}
            if good:
                return handler(request)
            text = challenge or f'Bearer realm="http://{server.host}/token",service="reg",scope="x"'
            return Reply(401, b"{}", {"WWW-Authenticate": text})

        return answer

    for path, handler in list(server.routes.items()):
        server.routes[path] = checked(handler)

    def token(request):
        if token_reply is not None:
            return token_reply(request)
        issued.append(f"t{len(issued)}")
        return Reply(200, json.dumps({"token": issued[-1], "expires_in": 300}).encode())

    server.routes["/token"] = token
    return image


async def test_a1_401_without_challenge(server, source):
    """A1: a 401 without WWW-Authenticate is "auth required", asked once."""
    server.routes["/v2/*"] = lambda request: Reply(401)
    async with source() as s:
        with pytest.raises(Denied, match="auth required"):
            await s.resolve(AMD64)
    assert len(server.seen) == 1


async def test_a2_token_always_refused(server, source):
    """A2: at most two token attempts, then an error that names the registry, not the token."""
    guard(server, accept=lambda given: False)
    async with source() as s:
        with pytest.raises(Denied) as caught:
            await s.resolve(AMD64)
    assert server.count("/token") == 2
    assert server.host in str(caught.value)
    assert "t0" not in str(caught.value) and "t1" not in str(caught.value)


async def test_bearer_anonymous(server, source, tmp_path):
    """An anonymous token is fetched once and serves manifest, config and blobs."""
    image = guard(server)
    async with source() as s:
        found = await s.resolve(AMD64)
        for layer in found.layers:
            await s.fetch_blob(
                layer.descriptor, tmp_path / layer.descriptor.digest.hex, lambda n: None
            )
    assert str(found.digest) == image.digest
    assert server.count("/token") == 1
    asked = next(r for r in server.seen if r.path == "/token")
    assert (
        "service=reg" in asked.query
        and "repository:app:pull" in URL("?" + asked.query).query["scope"]
    )


async def test_bearer_with_credentials(server, source, docker_config):
    """The password goes to the token server alone; the registry sees the token alone."""
    guard(server)
    async with source(docker_config=docker_config(server.host)) as s:
        await s.resolve(AMD64)
    for request in server.seen:
        basic = request.headers.get("authorization", "").startswith("Basic")
        assert basic == (request.path == "/token")


async def test_identity_token(server, source, docker_config):
    """An identity token is exchanged by POST, in the body."""
    guard(server)
    config = docker_config(server.host, identitytoken="refresh-me")
    async with source(docker_config=config) as s:
        await s.resolve(AMD64)
    asked = next(r for r in server.seen if r.path == "/token")
    assert asked.method == "POST" and b"refresh_token=refresh-me" in asked.body
    assert "authorization" not in asked.headers


async def test_a3_private_realm(server, other_server, source, docker_config):
    """A3: a realm on a private address elsewhere is refused, and nothing connects to it."""
    guard(server, challenge=f'Bearer realm="http://{other_server.host}/token",service="x"')
    for config in (None, docker_config(server.host)):
        async with source(docker_config=config) as s:
            with pytest.raises(Denied):
                await s.resolve(AMD64)
    assert other_server.connections == 0


async def test_a3_realm_by_configuration(server, other_server, source, docker_config):
    """A3: a private realm works where the configuration says so, host and credentials both."""
    guard(
        server,
        accept=lambda given: given == "Bearer abc",
        challenge=f'Bearer realm="http://{other_server.host}/token",service="x"',
    )
    other_server.routes["/token"] = lambda request: Reply(200, b'{"token": "abc"}')
    async with source(
        docker_config=docker_config(server.host),
        allowed_private=frozenset({other_server.host}),
        allowed_realms=frozenset({(server.host, other_server.host)}),
    ) as s:
        await s.resolve(AMD64)
    assert other_server.seen[0].headers["authorization"].startswith("Basic")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("registry", "realm", "credentials", "good"),
    [
        ("registry-1.docker.io", "https://auth.docker.io/token", True, True),
        ("ghcr.io", "https://ghcr.io/token", True, True),
        ("registry.gitlab.com", "https://gitlab.com/jwt/auth", True, True),
        ("reg.example.com", "https://evil.net/token", True, False),
        ("reg.example.com", "https://evil.net/token", False, True),
        ("reg.example.com", "http://reg.example.com/token", False, False),
        ("reg.example.co.uk", "https://evil.co.uk/token", True, False),
        ("reg.example.co.uk", "https://auth.example.co.uk/token", True, True),
        ("example.com", "https://notexample.com/token", True, False),
        ("10.1.2.3", "https://10.1.2.4/token", True, False),
        ("evil.com", "https://evil.com.attacker.net/token", True, False),
    ],
)
def test_a3_a4_realm_rules(registry, realm, credentials, good):
    """A3, A4: realms stay on the registry's domain with credentials, and on https."""
    home = Origin("https", registry, 443)

    def check():
        check_realm(home, URL(realm), with_credentials=credentials, settings=RegistrySettings())

    if good:
        check()
    else:
        with pytest.raises(Denied):
            check()


@pytest.mark.quick
@pytest.mark.parametrize("realm", ["file:///etc/shadow", "ftp://x/y", "gopher://x"])
def test_a4_realm_schemes(realm):
    """A4: a realm of a scheme other than http and https is refused."""
    with pytest.raises(Denied):
        origin_of(URL(realm))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("body", "value", "lifetime"),
    [
        (b'{"access_token": "a"}', "a", 60),
        (b'{"token": "t"}', "t", 60),
        (b'{"token": "t", "access_token": "a", "expires_in": 300}', "t", 300),
        (b'{"token": "t", "expires_in": 0}', "t", 60),
        (b'{"token": "t", "expires_in": -5}', "t", 60),
        (b'{"token": "t", "expires_in": 1000000000000}', "t", 86400),
        (b'{"token": "t", "expires_in": "300"}', "t", 60),
    ],
)
def test_a5_token_answers(body, value, lifetime):
    """A5: either name of the token; expires_in is clamped."""
    token = parse_token(body, limit=1 << 20, what="x")
    assert (token.value, token.lifetime) == (value, lifetime)
    assert value not in repr(token).replace("Token", "").replace("lifetime", "")


@pytest.mark.quick
@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"token": 5}',
        b'{"token": "a b"}',
        b'{"token": "a\\r\\nX: y"}',
        b"[]",
        b'{"token": ""}',
    ],
)
def test_a5_unusable_tokens(body):
    """A5: a token that cannot stand in a header is refused."""
    with pytest.raises(Rejected):
        parse_token(body, limit=1 << 20, what="x")


async def test_a6_huge_token(server, source):
    """A6: a token body without end is cut off at 1 MiB."""

    async def endless(request):
        await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
        for _ in range(64):
            await request.raw(b"x" * 65536)
        await asyncio.sleep(60)

    guard(server, token_reply=endless)
    async with source() as s:
        with pytest.raises(LimitExceeded, match="token server"):
            await s.resolve(AMD64)


async def test_a7_aged_token_403(server, source, tmp_path):
    """A7: many downloads that meet 403 together share one renewal, and each retries once."""
    image = guard(server)
    valid = set()

    def token(request):
        valid.clear()
        valid.add(f"Bearer n{server.count('/token')}")
        return Reply(200, json.dumps({"token": f"n{server.count('/token')}"}).encode())

    server.routes["/token"] = token
    for path, _ in list(server.routes.items()):
        if not path.startswith("/v2/"):
            continue
        digest = path.rpartition("/")[2]

        def answer(request, digest=digest):
            given = request.headers.get("authorization", "")
            if not given:
                return Reply(
                    401, b"", {"WWW-Authenticate": f'Bearer realm="http://{server.host}/token"'}
                )
            if given not in valid:
                return Reply(403)
            if digest in image.blobs:
                return Reply(200, image.blobs[digest])
            return Reply(200, image.top, {"Content-Type": image.manifests[image.digest][1]})

        server.routes[path] = answer
    async with source() as s:
        found = await s.resolve(AMD64)
        valid.clear()  # the registry forgets the token
        layer = found.layers[0].descriptor
        await asyncio.gather(
            *(s.fetch_blob(layer, tmp_path / f"copy{n}", lambda n: None) for n in range(8))
        )
    assert server.count("/token") == 2
    assert (tmp_path / "copy7").read_bytes() == image.blobs[str(layer.digest)]


async def test_a7_expired_presigned_url(server, other_server, source, tmp_path):
    """A7: a 403 from where a blob was redirected to asks the registry once more, then gives up."""
    image = make_image()
    server.add_image(image)
    digest = json.loads(image.top)["layers"][0]["digest"]
    answers = [Reply(403), Reply(200, image.blobs[digest])]
    other_server.routes["/signed"] = lambda request: answers.pop(0) if answers else Reply(403)
    server.routes[f"/v2/app/blobs/{digest}"] = lambda request: Reply(
        307, b"", {"Location": f"http://{other_server.host}/signed?sig=1"}
    )
    async with source(allowed_private=frozenset({other_server.host})) as s:
        descriptor = await descriptor_of(s, digest)
        await s.fetch_blob(descriptor, tmp_path / "b", lambda n: None)
        with pytest.raises(Denied):
            await s.fetch_blob(descriptor, tmp_path / "c", lambda n: None)
    assert (tmp_path / "b").read_bytes() == image.blobs[digest]
    assert server.count(f"/v2/app/blobs/{digest}") == 4


async def descriptor_of(source, digest):
    found = await source.resolve(AMD64)
    for descriptor in (found.manifest.config, *found.manifest.layers):
        if str(descriptor.digest) == digest:
            return descriptor
    raise AssertionError(digest)


async def test_a8_retry_after(server, source):
    """A8: 429 is waited out, whatever its Retry-After; without end it is an error."""
    image = make_image()
    server.add_image(image)
    path = "/v2/app/manifests/v1"
    good = server.routes[path]
    waits = ["0", "Wed, 21 Oct 2015 07:28:00 GMT", None, "1000000000"]

    def limited(request):
        if not waits:
            return good(request)
        wait = waits.pop(0)
        return Reply(429, b"", {"Retry-After": wait} if wait is not None else {})

    server.routes[path] = limited
    async with source() as s:
        assert str((await s.resolve(AMD64)).digest) == image.digest
    server.routes[path] = lambda request: Reply(429)
    async with source() as s:
        with pytest.raises(Unavailable, match="429"):
            await s.resolve(AMD64)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("5", 5.0),
        ("1000000000", 120.0),
        ("Sat, 01 Jan 2000 00:00:30 GMT", 30.0),
        ("Sat, 01 Jan 1999 00:00:00 GMT", 0.0),
        ("soon", 4.0),
        ("-5", 4.0),
        ("\u0665", 4.0),
        (None, 4.0),
    ],
)
def test_a8_delay(header, expected):
    """A8: seconds, a date, nonsense and nothing; capped; jitter adds a quarter at most."""
    now = datetime(2000, 1, 1, tzinfo=UTC)
    fixed = {"attempt": 3, "now": now, "backoff": 0.5, "backoff_cap": 30.0, "header_cap": 120.0}
    assert retry_delay(header, jitter=0.0, **fixed) == expected
    assert retry_delay(header, jitter=1.0, **fixed) == expected * 1.25


@pytest.mark.quick
def test_challenge_grammar():
    """Several challenges in one header, quoted pairs, odd case, and nonsense."""
    both = parse_challenges(['BEARER realm="https://a/b",Scope="x,y" , Basic realm="a\\"b"'])
    assert [c.scheme for c in both] == ["bearer", "basic"]
    assert both[0].parameters == {"realm": "https://a/b", "scope": "x,y"}
    assert both[1].parameters == {"realm": 'a"b'}
    assert parse_challenges(["", "=,=", '"']) == []
    assert parse_challenges(["Negotiate"])[0].scheme == "negotiate"
    parse_challenges(["a " * 100_000, 'Bearer realm="' + "\\" * 100_000])


def helper(tmp_path, body):
    path = tmp_path / "bin" / "docker-credential-test"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return f"{path.parent}:{os.environ['PATH']}"


def write_config(tmp_path, members):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(members))
    return path


async def ask(config, path, host="reg.example", seconds=10):
    return await find_credentials(host, config, helper_path=path, helper_seconds=seconds)


async def test_credential_helper(tmp_path):
    """credHelpers for its host, credsStore for the others, with the server on stdin."""
    path = helper(
        tmp_path,
        'read server; echo "{\\"ServerURL\\": \\"$server\\", \\"Username\\": \\"$server\\", '
        '\\"Secret\\": \\"pw\\"}"',
    )
    config = write_config(tmp_path, {"credHelpers": {"reg.example": "test"}})
    assert await ask(config, path) == Credentials("reg.example", "pw")
    assert await ask(config, path, "other.example") is None
    config = write_config(tmp_path, {"credsStore": "test"})
    assert await ask(config, path, "docker.io") == Credentials("https://index.docker.io/v1/", "pw")


async def test_credential_helper_failures(tmp_path):
    """A helper that has nothing, fails, hangs, floods, or is not there."""
    config = write_config(tmp_path, {"credHelpers": {"reg.example": "test"}})
    path = helper(tmp_path, "echo credentials not found in native keychain; exit 1")
    assert await ask(config, path) is None
    path = helper(tmp_path, "echo secret-looking text; exit 3")
    with pytest.raises(Denied) as caught:
        await ask(config, path)
    assert "secret-looking" not in str(caught.value)
    path = helper(tmp_path, "sleep 600 & wait")
    with pytest.raises(Unavailable, match="did not answer"):
        await ask(config, path, seconds=0.3)
    path = helper(tmp_path, "exec cat /dev/zero")
    with pytest.raises(LimitExceeded):
        await ask(config, path)
    path = helper(tmp_path, "echo nonsense")
    with pytest.raises(Rejected):
        await ask(config, path)
    config = write_config(tmp_path, {"credHelpers": {"reg.example": "absent"}})
    with pytest.raises(Denied, match="not installed"):
        await ask(config, path)
    config = write_config(tmp_path, {"credHelpers": {"reg.example": "../../x"}})
    with pytest.raises(Rejected):
        await ask(config, path)


async def test_docker_config_forms(tmp_path, docker_config):
    """auths by host, by URL and for docker.io; absent, broken and two-faced files."""
    assert await ask(tmp_path / "absent.json", None) is None
    for key in ("reg.example", "https://reg.example/v1/", "REG.example"):
        assert await ask(docker_config(key), None) is not None
    hub = docker_config("https://index.docker.io/v1/")
    assert await ask(hub, None, "docker.io") is not None
    assert await ask(hub, None) is None
    assert await ask(write_config(tmp_path, {"auths": {"reg.example": {}}}), None) is None
    for broken in (
        {"auths": {"reg.example": {"auth": "%%"}}},
        {"auths": []},
        {"auths": {"reg.example": 1}},
    ):
        with pytest.raises(Rejected):
            if broken["auths"] == []:
                broken = {"auths": [1]}
            await ask(write_config(tmp_path, broken), None)
    twice = tmp_path / "twice.json"
    twice.write_text('{"auths": {}, "auths": {}}')
    with pytest.raises(Rejected, match="twice"):
        await ask(twice, None)
    assert "s3cret" not in repr(await ask(docker_config("reg.example"), None))


@pytest.mark.quick
def test_where_docker_keeps_its_config():
    """DOCKER_CONFIG, then HOME, then nowhere."""
    both = {"DOCKER_CONFIG": "/d", "HOME": "/h"}
    assert str(docker_config_path(both)) == "/d/config.json"
    assert str(docker_config_path({"HOME": "/h"})) == "/h/.docker/config.json"
    assert docker_config_path({}) is None
