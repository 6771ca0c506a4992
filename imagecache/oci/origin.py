"""Rules about where a request may go: origins, redirects, realms, addresses. Pure functions.

Sources: OCI distribution specification (no Authorization across hosts), RFC 9110 section 15.4,
and CVE-2020-15157's class. An origin is (scheme, host, port); a credential belongs to one.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from yarl import URL

from imagecache.errors import Denied
from imagecache.oci.reference import DOCKER_HUB
from imagecache.oci.settings import RegistrySettings

_HUB_HOST = "registry-1.docker.io"
_HUB_REALM = "auth.docker.io"
_PORTS = {"http": 80, "https": 443}
# Second levels under country codes where strangers register: example.co.uk is not co.uk's.
_SHARED_SECOND_LEVELS = frozenset({"ac", "co", "com", "edu", "gov", "ne", "net", "or", "org"})
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port; what a credential, a token and a trusted connection belong to."""

    scheme: str
    host: str  # lower case, without brackets
    port: int

    @property
    def host_and_port(self) -> str:
        """`host`, or `host:port` where the port is not the scheme's own."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == _PORTS[self.scheme] else f"{name}:{self.port}"

    def url(self, path: str) -> URL:
        """An absolute URL; `path` is already encoded and starts with a slash."""
        return URL(f"{self.scheme}://{self.host_and_port}{path}", encoded=True)


def origin_of(url: URL) -> Origin:
    """The origin of an absolute http or https URL; raises `Denied` for other schemes."""
    if url.scheme not in _PORTS or not url.host:
        raise Denied(f"refusing a URL of scheme {url.scheme[:20]!a}")
    return Origin(url.scheme, url.host.lower().rstrip("."), url.port or _PORTS[url.scheme])


def registry_origin(host: str, settings: RegistrySettings) -> Origin:
    """Where a reference's host is spoken to, and how: HTTPS, but for loopback or by setting."""
    wire_host = _HUB_HOST if host == DOCKER_HUB else host
    bare = URL(f"//{wire_host}")
    name = (bare.host or wire_host).lower()
    tls = _named(settings.tls_hosts | settings.insecure_tls_hosts, name, bare.explicit_port)
    plain = not tls and (
        is_loopback_name(name) or _named(settings.plain_http_hosts, name, bare.explicit_port)
    )
    scheme = "http" if plain else "https"
    return Origin(scheme, name, bare.explicit_port or _PORTS[scheme])


def is_loopback_name(host: str) -> bool:
    """Whether a host is this machine by its very name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def next_hop(current: URL, location: str, settings: RegistrySettings, what: str) -> URL:
    """The URL a redirect leads to, without user info and fragment; raises `Denied`.

    https never becomes http; http stays allowed only for hosts that plain HTTP is allowed for.
    """
    try:
        target = current.join(URL(location, encoded=True))
        target = target.with_fragment(None)
        if target.raw_user is not None or target.raw_password is not None:
            target = target.with_user(None)
        goal = origin_of(target)
    except ValueError:
        raise Denied(f"{what}: redirected to something that is not a URL") from None
    if goal.scheme == "http" and goal != origin_of(current):
        if current.scheme == "https":
            raise Denied(f"{what}: refusing a redirect from https to http ({goal.host_and_port})")
        if not plain_http_allowed(goal, settings):
            raise Denied(
                f"{what}: refusing a redirect to plain HTTP at {goal.host_and_port}",
                remedy="list it among the plain HTTP hosts if that is meant",
            )
    return target


def plain_http_allowed(goal: Origin, settings: RegistrySettings) -> bool:
    """Whether an http origin may be spoken to at all."""
    return is_loopback_name(goal.host) or _named(settings.plain_http_hosts, goal.host, goal.port)


def check_realm(
    registry: Origin, realm: URL, *, with_credentials: bool, settings: RegistrySettings
) -> None:
    """Refuse a token realm that a registry must not name (A3, A4); raises `Denied`.

    Over https for an https registry; and where credentials would be sent, on the registry's
    own registrable domain, or on a pair that is known or configured.
    """
    goal = origin_of(realm)
    who = f"registry {registry.host_and_port}"
    if goal.scheme == "http" and registry.scheme == "https":
        raise Denied(f"{who} names a token realm over plain HTTP ({goal.host_and_port})")
    if goal.scheme == "http" and goal != registry and not plain_http_allowed(goal, settings):
        raise Denied(
            f"{who} names a token realm over plain HTTP ({goal.host_and_port})",
            remedy="list it among the plain HTTP hosts if that is meant",
        )
    if not with_credentials or _same_domain(registry.host, goal.host):
        return
    if (registry.host, goal.host) == (_HUB_HOST, _HUB_REALM):
        return
    for registry_name, realm_name in settings.allowed_realms:
        if _named(frozenset({registry_name}), registry.host, registry.port) and _named(
            frozenset({realm_name}), goal.host, goal.port
        ):
            return
    raise Denied(
        f"{who} wants its credentials sent to {goal.host_and_port}, outside its own domain",
        remedy=f"allow the realm {goal.host_and_port} for this registry if that is meant",
    )


def _same_domain(registry: str, realm: str) -> bool:
    """Whether two hosts share a registrable domain, judged without a public suffix list."""
    if registry == realm:
        return True
    if _is_address(registry) or _is_address(realm):
        return False
    ours, theirs = registry.split("."), realm.split(".")
    if len(ours) < 2 or len(theirs) < 2:
        return False
    depth = 3 if len(ours[-1]) == 2 and ours[-2] in _SHARED_SECOND_LEVELS else 2
    return len(ours) >= depth and ours[-depth:] == theirs[-depth:]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def address_allowed(address: str, settings: RegistrySettings) -> bool:
    """Whether a redirect, realm or foreign URL may connect to a resolved address (A3, A11).

    Public unicast addresses may; others by a network in `allowed_private` alone (its host
    names are matched before, by name). IPv4 inside IPv6 counts as IPv4.
    """
    ip = _unwrapped(ipaddress.ip_address(address.partition("%")[0]))
    if ip.is_global and not ip.is_multicast and not ip.is_reserved:
        return True
    for allowed in settings.allowed_private:
        if "/" in allowed:
            network = ipaddress.ip_network(allowed, strict=False)
            if network.version == ip.version and ip in network:
                return True
    return False


def _unwrapped(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 form carries, else the address itself."""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip.sixtofour is not None:
            return ip.sixtofour
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def host_named(names: frozenset[str], origin: Origin) -> bool:
    """Whether a set of `host` and `host:port` entries names an origin."""
    return _named(names, origin.host, origin.port)


def _named(names: frozenset[str], host: str, port: int | None) -> bool:
    shown = f"[{host}]" if ":" in host else host
    return bool(names & {host, shown, f"{shown}:{port}"})
