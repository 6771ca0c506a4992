"""Who may do what over the control API: tokens, roles, owners, web pages, internal hosts."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import trustme
from kits.httpapi import Remote, free_port, preloaded, served, write_tokens

from imagecache.daemon.access import Role, Tokens, Unauthenticated, peer_caller
from imagecache.daemon.naming import require_public
from imagecache.errors import Denied, Unavailable, UsageError
from imagecache.settings import ApiSection, Settings


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens.toml")


@pytest.fixture
async def remote(where: Settings, tokens_file: Path) -> AsyncIterator[Remote]:
    port = free_port()
    api = ApiSection(tcp=f"127.0.0.1:{port}", tokens=str(tokens_file), private_images=True)
    async with served(where, api), aiohttp.ClientSession() as session:
        yield Remote(session, f"http://127.0.0.1:{port}")


async def test_absent_and_wrong_tokens_look_the_same(remote: Remote) -> None:
    """I11: 401 without detail for no token, a wrong one, another scheme; health needs none."""
    wrong = [await remote.call(who, "GET", "/v1/exports") for who in (None, "x", "", "boss ")]
    assert {status for status, _ in wrong} == {401}
    assert len({str(problem) for _, problem in wrong}) == 1
    basic = await remote.call(None, "GET", "/v1/status", Authorization="Basic " + "boss" * 9)
    assert basic[0] == 401
    assert (await remote.call(None, "GET", "/healthz"))[0] == 200
    assert (await remote.call("reader", "GET", "/metrics"))[0] == 200


async def test_roles_bound_what_a_token_may_do(remote: Remote) -> None:
    """I11: a known token over its role is 403."""
    body = {"images": ["oci:/nowhere:latest"]}
    assert (await remote.call("reader", "POST", "/v1/preloads", body))[0] == 403
    assert (await remote.call("a", "POST", "/v1/preloads", body))[0] == 202
    own = {"image": "oci:/nowhere:latest", "socket": "/tmp/x.sock"}
    assert (await remote.call("a", "POST", "/v1/exports", own))[0] == 403


async def test_owners_do_not_see_each_other(remote: Remote, built: str) -> None:
    """I11: another owner's export or job is answered exactly as one that is not there."""
    body = {"image": built}
    await preloaded(remote, "a", built)
    status, first = await remote.call("a", "POST", "/v1/exports", body)
    assert (status, first["name"].startswith("team-a.")) == (201, True)
    assert (await remote.call("a", "POST", "/v1/exports", body))[0] == 200
    _, jobs = await remote.call("a", "POST", "/v1/preloads", {"images": [built]})
    (job,) = jobs["preloads"]
    for path in (f"/v1/exports/{first['name']}", f"/v1/preloads/{job['id']}"):
        status, hidden = await remote.call("b", "DELETE", path)
        absent_path = path.rsplit("/", 1)[0] + "/absent"
        _, absent = await remote.call("b", "DELETE", absent_path)
        assert status == 404
        assert str(hidden).replace(path.rsplit("/", 1)[1], "absent") == str(absent)
        assert (await remote.call("boss", "GET", path))[0] == 200
    assert (await remote.call("b", "GET", "/v1/exports"))[1] == {"exports": []}
    assert (await remote.call("b", "GET", "/v1/preloads"))[1] == {"preloads": []}
    assert (await remote.call("b", "POST", "/v1/exports", body))[0] == 404
    await preloaded(remote, "b", built)
    status, second = await remote.call("b", "POST", "/v1/exports", body)
    assert (status, second["name"]) == (201, first["name"].replace("team-a", "team-b"))
    forced = await remote.call("b", "DELETE", f"/v1/exports/{second['name']}?force=1")
    assert forced[0] == 403
    assert (await remote.call("b", "DELETE", f"/v1/exports/{second['name']}"))[0] == 204


async def test_web_pages_get_nothing(remote: Remote) -> None:
    """I10: a request that a browser made for a page is refused; no CORS header is ever sent."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1"):
        assert (await remote.call("boss", "GET", "/v1/status", Origin=origin))[0] == 403
    assert (await remote.call("boss", "OPTIONS", "/v1/exports"))[0] == 405
    assert (await remote.call(None, "GET", "/v1/status", Host="evil.example"))[0] == 401


async def test_repeats_with_a_key_get_the_first_answer(remote: Remote, built: str) -> None:
    """I4: the same request id is the same result, also with the export gone; another body: 422."""
    key = {"Idempotency-Key": "k1"}
    await preloaded(remote, "a", built)
    first = await remote.call("a", "POST", "/v1/exports", {"image": built}, **key)
    name = first[1]["name"]
    assert (await remote.call("a", "DELETE", f"/v1/exports/{name}"))[0] == 204
    assert await remote.call("a", "POST", "/v1/exports", {"image": built}, **key) == first
    assert (await remote.call("a", "GET", "/v1/exports"))[1] == {"exports": []}
    other = await remote.call("a", "POST", "/v1/exports", {"image": built, "name": "n"}, **key)
    assert other[0] == 422
    bad = {"Idempotency-Key": "a b"}
    assert (await remote.call("a", "POST", "/v1/exports", {"image": built}, **bad))[0] == 400
    together = await asyncio.gather(
        *(
            remote.call(
                "a", "POST", "/v1/preloads", {"images": [built]}, **{"Idempotency-Key": "k2"}
            )
            for _ in range(20)
        )
    )
    assert len({answer["preloads"][0]["id"] for _, answer in together}) == 1


async def test_misplaced_secrets_are_neither_answered_nor_logged(
    remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    """I13: credentials are the daemon's configuration; in a body they are unknown fields."""
    caplog.set_level(logging.DEBUG)
    body = {"images": ["docker.io/x"], "credentials": {"password": "hunter2"}}
    status, answer = await remote.call("a", "POST", "/v1/preloads", body)
    assert status == 400
    assert "credentials" in answer["detail"]
    listed = await remote.call("boss", "GET", "/v1/preloads")
    assert "hunter2" not in str(answer) + str(listed) + caplog.text


async def test_network_callers_name_public_registries_only(
    where: Settings, tokens_file: Path
) -> None:
    """I14: files of this host and private registries are 403 over TCP, fine on the unix socket."""
    port = free_port()
    api = ApiSection(tcp=f"127.0.0.1:{port}", tokens=str(tokens_file))
    async with served(where, api), aiohttp.ClientSession() as session:
        remote = Remote(session, f"http://127.0.0.1:{port}")
        for image in ("oci:/etc:x", "docker-archive:/etc/passwd", "127.0.0.1:5000/x", "[::1]:5/x"):
            status, _ = await remote.call("boss", "POST", "/v1/preloads", {"images": [image]})
            assert status == 403, image
        connector = aiohttp.UnixConnector(path=str(where.control_socket))
        async with aiohttp.ClientSession("http://x", connector=connector) as local:
            body = {"images": ["127.0.0.1:1/x"]}
            async with local.post("/v1/preloads", json=body) as answer:
                assert answer.status == 202


async def test_private_addresses_behind_names_are_refused() -> None:
    """I14: what a name resolves to counts, not how it looks."""
    for image in ("localhost/x", "10.0.0.1/x", "169.254.169.254/x", "localhost:5000/x"):
        with pytest.raises((Denied, Unavailable)):
            await require_public(image)
    await require_public("docker.io/library/x")


async def test_tls_serves_and_clear_text_leaves_this_host_never(
    where: Settings, tokens_file: Path, tmp_path: Path
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    port = free_port()
    api = ApiSection(
        tcp=f"127.0.0.1:{port}",
        tokens=str(tokens_file),
        tls_certificate=str(tmp_path / "chain.pem"),
        tls_key=str(tmp_path / "key.pem"),
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    connector = aiohttp.TCPConnector(ssl=context)
    async with served(where, api), aiohttp.ClientSession(connector=connector) as session:
        remote = Remote(session, f"https://127.0.0.1:{port}")
        assert (await remote.call("reader", "GET", "/v1/status"))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await Remote(session, f"http://127.0.0.1:{port}").call("reader", "GET", "/v1/status")
    open_to_all = ApiSection(tcp=f"0.0.0.0:{port}", tokens=str(tokens_file))
    with pytest.raises(UsageError, match="clear"):
        async with served(where, open_to_all):
            pass


@pytest.mark.quick
def test_tokens_files_are_strict(tmp_path: Path) -> None:
    """J10: a mistake in the tokens file refuses the start; others may not write it."""
    good = {"role": "read", "sha256": "0" * 64}
    for tables in (
        {"x": good | {"role": "god"}},
        {"x": good | {"sha256": "zz"}},
        {"x": good | {"password": "p"}},
        {"x": good | {"owner": "../b"}},
        {"x": 3},
    ):
        with pytest.raises(UsageError):
            Tokens.parse({"tokens": tables})
    with pytest.raises(UsageError):
        Tokens.parse({"token": {}})
    path = tmp_path / "t"
    path.write_text("")
    path.chmod(0o666)
    with pytest.raises(Denied):
        Tokens.read(path)
    with pytest.raises(Unauthenticated):
        Tokens.parse({"tokens": {"x": good}}).caller("Bearer \udcff")


@pytest.mark.quick
def test_unix_peers_have_the_role_of_their_user() -> None:
    """K7: our own user may all, another of the socket's group what is configured."""
    left, right = socket.socketpair()
    with left, right:
        import os

        assert peer_caller(left, os.getuid(), Role.READ).role is Role.ADMIN
        if os.getuid() == 0:
            assert peer_caller(left, 12345, Role.READ).role is Role.ADMIN


async def test_socket_group_reaches_the_control_socket_and_nothing_else(where: Settings) -> None:
    """K7: by default the socket is its owner's; with a group, that group may pass to it."""
    import grp
    import os

    async with served(where, ApiSection()):
        assert where.control_socket.stat().st_mode & 0o777 == 0o600
        assert where.state_dir.stat().st_mode & 0o077 == 0
    group = grp.getgrgid(os.getgid()).gr_name
    async with served(where, ApiSection(socket_group=group)):
        assert where.control_socket.stat().st_mode & 0o777 == 0o660
        assert where.state_dir.stat().st_mode & 0o777 == 0o710
        others = [p for p in where.state_dir.iterdir() if p != where.control_socket]
        writable = [p.name for p in others if p.stat().st_mode & 0o020]
        assert not writable
