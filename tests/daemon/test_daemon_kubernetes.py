"""The Kubernetes manifests against the schemas of a version, and against our command line."""

import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "packaging/kubernetes").glob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_fits_the_schema_and_the_command_line(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    kubernetes_validate.validate(manifest, "1.31", strict=True)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    command, *arguments = container["args"]
    flags = [argument for argument in arguments[1:] if argument.startswith("--")]
    told = subprocess.run(
        [ROOT / ".venv/bin" / command, arguments[0], "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(flag in told for flag in flags)
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in manifest["spec"]["template"]["spec"]["volumes"]}
