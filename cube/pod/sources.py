"""ConfigMaps and Secrets of the same file, by name. Pure."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Final, Literal

from cube.pod.kubernetes import ConfigMapManifest, PullSecretRef, SecretManifest
from cube.pod.model import PullSecret
from cube.pod.places import Place
from imagecache.errors import LimitExceeded

Kind = Literal["ConfigMap", "Secret"]
SOURCE_LIMIT: Final = 1024 * 1024  # bytes of one ConfigMap or Secret
_PULL_TYPE: Final = "kubernetes.io/dockerconfigjson"
_PULL_KEY: Final = ".dockerconfigjson"


@dataclass(slots=True)
class Sources:
    """What documents of the file define, by kind, namespace and name."""

    contents: dict[tuple[str, str, str], dict[str, bytes]] = field(default_factory=dict)
    types: dict[tuple[str, str], str] = field(default_factory=dict)  # of secrets

    def find(
        self, kind: Kind, namespace: str, name: str, place: Place, *, optional: bool = False
    ) -> dict[str, bytes] | None:
        """The contents; None for an optional one that is missing; Rejected for another."""
        found = self.contents.get((kind, namespace, name))
        if found is None and not optional:
            place.reject(
                f"names {kind} {name!r}, which is not in this file",
                remedy=f"put the {kind} into the same file, as a document of its own",
            )
        return found

    def add(self, kind: Kind, place: Place, manifest: ConfigMapManifest | SecretManifest) -> None:
        """Keeps a document's contents."""
        meta = manifest.metadata
        name = (place / "metadata" / "name").name(meta.name or "", dots=True)
        key = (kind, meta.namespace, name)
        if key in self.contents:
            place.reject(f"{kind} {name!r} stands twice in this file")
        if isinstance(manifest, SecretManifest):
            values = decode(manifest.data or {}, place / "data")
            texts = manifest.string_data or {}
            self.types[(meta.namespace, name)] = manifest.type
        else:
            values = decode(manifest.binary_data or {}, place / "binaryData")
            texts = manifest.data or {}
        values |= {name: text.encode() for name, text in texts.items()}
        check_size(values, place)
        self.contents[key] = values

    def pull_secrets(
        self, refs: list[PullSecretRef], namespace: str, place: Place
    ) -> tuple[PullSecret, ...]:
        """Credentials of a pod's imagePullSecrets; messages never show a secret."""
        found: list[PullSecret] = []
        for index, ref in enumerate(refs):
            here = place / index
            if ref.name is None:
                if not (ref.registry_server and ref.username and ref.password):
                    here.reject("needs a name, or registryServer, username and password")
                found.append(
                    PullSecret(
                        server=ref.registry_server, username=ref.username, password=ref.password
                    )
                )
                continue
            values = self.find("Secret", namespace, ref.name, here) or {}
            kind = self.types[(namespace, ref.name)]
            if kind != _PULL_TYPE or _PULL_KEY not in values:
                here.reject(
                    f"names Secret {ref.name!r} of type {kind!r}",
                    remedy=f"a pull secret is of type {_PULL_TYPE}, with the key {_PULL_KEY}",
                )
            found += _docker_config(values[_PULL_KEY], here)
        return tuple(found)


def _docker_config(raw: bytes, place: Place) -> list[PullSecret]:
    try:
        entries = json.loads(raw)["auths"]
        secrets: list[PullSecret] = []
        for server, entry in entries.items():
            username, password = entry.get("username"), entry.get("password")
            if entry.get("auth"):
                plain = base64.b64decode(entry["auth"], validate=True).decode()
                username, _, password = plain.partition(":")
            secrets.append(PullSecret(server=server, username=username, password=password))
    except (ValueError, KeyError, TypeError, AttributeError):
        place.reject("names a pull secret whose contents are not a Docker configuration")
    return secrets


def decode(values: dict[str, str], place: Place) -> dict[str, bytes]:
    """Base64 values as bytes."""
    decoded: dict[str, bytes] = {}
    for key, text in values.items():
        try:
            decoded[key] = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            (place / key).reject("is not base64")
    return decoded


def check_size(values: dict[str, bytes], place: Place) -> None:
    """Raises LimitExceeded for contents over 1 MiB."""
    total = sum(len(key) + len(value) for key, value in values.items())
    if total > SOURCE_LIMIT:
        raise LimitExceeded(f"{place} holds {total} bytes, over the limit of {SOURCE_LIMIT}")
