"""Where a pull may go: redirects, addresses, schemes, certificates."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from aiohttp.abc import AbstractResolver
from kits.oci_images import make_image
from kits.registry_server import Reply, ScriptedServer
from yarl import URL

from imagecache.errors import Denied
from imagecache.oci.descriptor import Descriptor
from imagecache.oci.digest import Digest
from imagecache.oci.origin import address_allowed, next_hop, registry_origin
from imagecache.oci.platform import Platform
from imagecache.oci.settings import RegistrySettings

AMD64 = Platform("linux", "amd64")


class Names(AbstractResolver):
    """Resolves every name to one address."""

    def __init__(self, address):
        self.address = address
        self.asked = []

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.asked.append(host)
        return [
            {
                "hostname": host,
                "host": self.address,
                "port": port,
                "family": socket.AF_INET,
                "proto": 0,
                "flags": 0,
            }
        ]

    async def close(self):
        pass


def redirect(location, status=307):
    return lambda request: Reply(status, b"moved", {"Location": location})


def layer_of(image):
    import json

    return json.loads(image.top)["layers"][0]["digest"]


async def test_a9_no_authorization_elsewhere(server, other_server, source, tmp_path, docker_config):
    """A9: a redirect to another host is followed without Authorization (or cookies)."""
    image = make_image()
    server.add_image(image)
    inner = dict(server.routes)

    def basic(handler):
        def answer(request):
            if request.headers.get("authorization", "").startswith("Basic "):
                return handler(request)
            return Reply(401, b"", {"WWW-Authenticate": 'Basic realm="x"', "Set-Cookie": "a=b"})

        return answer

    digest = layer_of(image)
    inner[f"/v2/app/blobs/{digest}"] = redirect(
        f"http://user:pw@{other_server.host}/data?sig=a%2Fb"
    )
    server.routes = {path: basic(handler) for path, handler in inner.items()}
    other_server.routes["/data"] = lambda request: Reply(200, image.blobs[digest])
    async with source(
        docker_config=docker_config(server.host), allowed_private=frozenset({other_server.host})
    ) as s:
        found = await s.resolve(AMD64)
        await s.fetch_blob(found.layers[0].descriptor, tmp_path / "b", lambda n: None)
    assert (tmp_path / "b").read_bytes() == image.blobs[digest]
    for request in other_server.seen:
        assert "authorization" not in request.headers and "cookie" not in request.headers
        assert request.target == "/data?sig=a%2Fb"


async def test_a10_loops_and_long_chains(server, source):
    """A10: a redirect loop and twenty hops stop after five."""
    server.routes["/v2/*"] = lambda request: Reply(307, b"", {"Location": request.path})
    async with source() as s:
        with pytest.raises(Denied, match="redirects"):
            await s.resolve(AMD64)
    assert len(server.seen) == 6
    server.seen.clear()
    server.routes["/hop/*"] = lambda r: redirect(f"/hop/{int(r.path.rpartition('/')[2]) + 1}")(r)
    server.routes["/v2/*"] = redirect("/hop/1")
    async with source() as s:
        with pytest.raises(Denied, match="redirects"):
            await s.resolve(AMD64)
    assert len(server.seen) == 6


@pytest.mark.quick
@pytest.mark.parametrize(
    "location",
    [
        "http://reg.example/x",
        "http://127.0.0.1/x",
        "file:///etc/shadow",
        "ftp://reg.example/",
        "gopher://x/",
        "http://[::1",
        "data:,x",
    ],
)
def test_a10_refused_targets(location):
    """A10: https never becomes http, nor another scheme, nor nonsense."""
    with pytest.raises(Denied):
        next_hop(URL("https://reg.example/v2/x"), location, RegistrySettings(), "x")


@pytest.mark.quick
def test_a10_user_info_and_relative_targets():
    """A10: user info is stripped; relative targets and encodings are kept as they are."""
    here = URL("https://reg.example/v2/app/blobs/x")
    hop = next_hop(here, "https://u:p@cdn.example/a%2Fb?X-Sig=%2B%3D#frag", RegistrySettings(), "x")
    assert str(hop) == "https://cdn.example/a%2Fb?X-Sig=%2B%3D"
    assert (
        str(next_hop(here, "../y?z", RegistrySettings(), "x")) == "https://reg.example/v2/app/y?z"
    )
    assert (
        str(next_hop(here, "//cdn.example/y", RegistrySettings(), "x")) == "https://cdn.example/y"
    )


async def test_a11_redirect_to_private_address(server, other_server, source):
    """A11: a redirect to loopback is refused before anything connects."""
    server.routes["/v2/*"] = redirect(f"http://{other_server.host}/secret")
    async with source() as s:
        with pytest.raises(Denied, match="public"):
            await s.resolve(AMD64)
    assert other_server.connections == 0


async def test_a11_dns_rebinding(server, other_server, source):
    """A11: the address that a name resolves to is what is judged."""
    server.routes["/v2/*"] = redirect(f"http://evil.example:{other_server.port}/secret")
    names = Names("127.0.0.1")
    async with source(resolver=names, plain_http_hosts=frozenset({"evil.example"})) as s:
        with pytest.raises(Denied, match="public"):
            await s.resolve(AMD64)
    assert names.asked == ["evil.example"]
    assert other_server.connections == 0


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0x7f000001", "[::ffff:127.0.0.1]"])
async def test_a11_odd_spellings_of_loopback(server, other_server, source, host):
    """A11: other spellings of 127.0.0.1 are no way round."""
    server.routes["/v2/*"] = redirect(f"http://{host}:{other_server.port}/secret")
    async with source(plain_http_hosts=frozenset({host})) as s:
        with pytest.raises(Denied):
            await s.resolve(AMD64)
    assert other_server.connections == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("10.0.0.8", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("::ffff:10.0.0.8", False),
        ("2002:0a00:0001::", False),
        ("64:ff9b::a00:8", False),
        ("64:ff9b::808:808", True),
    ],
)
def test_a11_addresses(address, good):
    """A11: only public unicast addresses, IPv4 inside IPv6 judged as IPv4."""
    assert address_allowed(address, RegistrySettings()) is good


@pytest.mark.quick
def test_a11_allowed_networks():
    """A11: networks by configuration."""
    settings = RegistrySettings(allowed_private=frozenset({"10.0.0.0/8", "fd00::/8"}))
    assert address_allowed("10.9.8.7", settings)
    assert address_allowed("::ffff:10.9.8.7", settings)
    assert address_allowed("fd00::1", settings)
    assert not address_allowed("127.0.0.1", settings)


@pytest.mark.quick
def test_plain_http_only_for_loopback_or_by_setting():
    """HTTPS for all but loopback and configured hosts; docker.io has its own wire host."""

    def scheme(host, **settings):
        return registry_origin(host, RegistrySettings(**settings)).scheme

    assert scheme("reg.example") == "https"
    assert scheme("10.0.0.5:5000") == "https"
    assert scheme("localhost:5000") == scheme("127.0.0.1:5000") == scheme("[::1]:5000") == "http"
    assert scheme("localhost.example:5000") == "https"
    assert scheme("reg.example:5000", plain_http_hosts=frozenset({"reg.example:5000"})) == "http"
    assert scheme("reg.example:5001", plain_http_hosts=frozenset({"reg.example:5000"})) == "https"
    assert scheme("localhost:5000", tls_hosts=frozenset({"localhost"})) == "https"
    assert registry_origin("docker.io", RegistrySettings()).host == "registry-1.docker.io"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def server_context(authority, *names, **more):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **more).configure_cert(context)
    return context


@pytest.mark.parametrize("case", ["self-signed", "wrong host", "expired"])
async def test_a26_bad_certificates(case, authority, source, tmp_path):
    """A26: an unknown, foreign or expired certificate is refused, unless this host may."""
    more = {"not_after": datetime.now(UTC) - timedelta(days=1)} if case == "expired" else {}
    name = "other.example" if case == "wrong host" else "127.0.0.1"
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    trusted = None if case == "self-signed" else ca_file
    async with ScriptedServer(server_context(authority, name, **more)) as server:
        server.add_image(make_image())
        async with source(
            host=server.host, tls_hosts=frozenset({server.host}), ca_file=trusted
        ) as s:
            with pytest.raises(Denied, match="TLS"):
                await s.resolve(AMD64)
        assert not server.seen
        async with source(host=server.host, insecure_tls_hosts=frozenset({server.host})) as s:
            await s.resolve(AMD64)


async def test_a26_good_certificate(authority, source, tmp_path):
    """A26: a certificate of a configured authority is taken."""
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    async with ScriptedServer(server_context(authority, "127.0.0.1")) as server:
        server.add_image(make_image())
        async with source(
            host=server.host, tls_hosts=frozenset({"127.0.0.1"}), ca_file=ca_file
        ) as s:
            await s.resolve(AMD64)


async def test_a10_https_to_http_on_the_wire(authority, server, source, tmp_path):
    """A10: a TLS registry that redirects to plain HTTP, even on an allowed host."""
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    async with ScriptedServer(server_context(authority, "127.0.0.1")) as secure:
        secure.routes["/v2/*"] = redirect(f"http://{server.host}/x")
        async with source(
            host=secure.host,
            tls_hosts=frozenset({secure.host}),
            ca_file=ca_file,
            allowed_private=frozenset({server.host}),
        ) as s:
            with pytest.raises(Denied, match="https to http"):
                await s.resolve(AMD64)
    assert server.connections == 0


async def test_b10_foreign_layer_by_url(authority, server, source, tmp_path, docker_config):
    """B10: where enabled, from an https URL, and without the registry's credentials."""
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    body = b"foreign" * 1000
    async with ScriptedServer(server_context(authority, "127.0.0.1")) as vendor:
        vendor.routes["/gone"] = lambda request: Reply(404)
        vendor.routes["/layer"] = lambda request: Reply(200, body)
        descriptor = Descriptor(
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            Digest.of(body),
            len(body),
            urls=(f"https://{vendor.host}/gone", f"https://{vendor.host}/layer"),
        )
        async with source(
            foreign_urls=True,
            ca_file=ca_file,
            docker_config=docker_config(vendor.host),
            allowed_private=frozenset({vendor.host}),
        ) as s:
            await s.fetch_blob(descriptor, tmp_path / "b", lambda n: None)
        assert (tmp_path / "b").read_bytes() == body
        assert all("authorization" not in request.headers for request in vendor.seen)


async def test_one_connection_serves_a_pull(server, source, tmp_path):
    """Manifest, config and blobs, one after the other, share one connection."""
    server.add_image(make_image())
    async with source() as s:
        found = await s.resolve(AMD64)
        for layer in found.layers:
            target = tmp_path / layer.descriptor.digest.hex
            await s.fetch_blob(layer.descriptor, target, lambda n: None)
    assert len(server.seen) == 4 and server.connections == 1
