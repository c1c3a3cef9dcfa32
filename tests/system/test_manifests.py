"""The manifests of deploy/: their validity by the API's schema, and the privileges that they drop."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.agent import PATIENCE
from support.manifests import DEPLOY, containers, parsed, rendered
from support.skip_unless import installed, program

from keyferry_agent.config import settings

pytestmark = program("kubectl", "kubernetes-client")
BASES = ("sidecar", "daemonset")
VERSIONS = ("1.29", "1.37")
"""Of Kubernetes: the first in which sidecars are on by default, and the newest that the validator knows."""

NOTHING = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def template(base: str) -> Any:
    """The pod that a base makes."""
    (made,) = (
        document for document in parsed(rendered(DEPLOY / base)) if document["kind"] in {"Deployment", "DaemonSet"}
    )
    return made["spec"]["template"]


def metered(folder: Path, base: str) -> list[Any]:
    """Return the output of a base with its component for metrics; `folder` is for the overlay."""
    folder.mkdir()
    at = os.path.relpath(DEPLOY / base, folder)
    (folder / "kustomization.yaml").write_text(f"resources: [{at}]\ncomponents: [{at}/metrics]\n")
    return parsed(rendered(folder))


@installed("kubernetes-validate", "make test-hosts")
@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_as_the_api_has_it(tmp_path: Path, version: str) -> None:
    """Validation is strict: an unknown field is an error, so no protection is missing silently."""
    files = [DEPLOY / "daemonset" / "application.yaml"]
    for base in BASES:
        files.append(tmp_path / f"{base}.yaml")
        # A PodMonitor does not belong to the API itself.
        made = [each for each in metered(tmp_path / base, base) if each["kind"] != "PodMonitor"]
        files[-1].write_text(yaml.safe_dump_all(made))
    validator = Path(sys.executable).with_name("kubernetes-validate")

    def validate(*paths: Path) -> "subprocess.CompletedProcess[str]":
        command = [str(validator), "--strict", "-k", version, *map(str, paths)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)

    ended = validate(*files)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(files[1].read_text().replace("readOnlyRootFilesystem", "readOnlyRootFileSystem"))
    assert validate(misspelt).returncode != 0


@pytest.mark.parametrize("base", BASES)
def test_no_container_has_more_than_it_needs(base: str) -> None:
    """Every container meets Pod Security's level `restricted`, except the one that makes the agent's folder."""
    pod = template(base)
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostPID", "hostIPC", "hostNetwork", "shareProcessNamespace"} & set(spec)
    roots = set()
    for name, container in containers(pod).items():
        context = container["securityContext"]
        if context["runAsUser"] == 0:
            roots.add(name)
            assert context["capabilities"].pop("add") == ["CHOWN"]
        assert {key: context[key] for key in NOTHING} == NOTHING
    assert roots == ({"folder"} if base == "daemonset" else set())


@pytest.mark.parametrize("base", BASES)
def test_applications_share_no_socket_volume(base: str) -> None:
    """Each application's container mounts at most one socket volume, read-only, and neither of the secrets."""
    pod = template(base)
    seen: list[str] = []
    for name, container in containers(pod).items():
        if name not in {"keyferry-agent", "folder"}:
            (mount,) = container["volumeMounts"]
            assert mount["readOnly"] is True
            seen.append(mount["name"])
    assert len(seen) == len(set(seen))
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert all("emptyDir" in volumes[name] for name in seen)
    assert all(each["emptyDir"]["medium"] == "Memory" for each in volumes.values() if "emptyDir" in each)


@pytest.mark.parametrize("base", BASES)
def test_the_configuration_names_the_files_that_are_mounted(base: str) -> None:
    """Each path of the configuration is in a volume of the agent's container, and probes use the agent's socket."""
    config = settings.read(DEPLOY / base / "agent.toml")
    agent = containers(template(base))["keyferry-agent"]
    mounts = {Path(mount["mountPath"]) for mount in agent["volumeMounts"]}
    sockets = [listener.path for listener in config.listeners]
    assert config.keyring is not None
    assert config.unseal is not None
    for path in (*sockets, config.keyring, config.unseal, Path(agent["args"][2])):
        assert path.parent in mounts, path
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = agent[probe]["exec"]["command"]
        kind = "--ready" if probe == "readinessProbe" else "--live"
        assert command[:3] == ["keyferry", "status", kind]
        assert "--socket" not in command or Path(command[command.index("--socket") + 1]) in sockets


@pytest.mark.parametrize("base", BASES)
def test_the_component_names_the_port_that_is_scraped(tmp_path: Path, base: str) -> None:
    """The PodMonitor selects the pods of the base, and a NetworkPolicy opens the port of no sidecar's application."""
    made = metered(tmp_path / base, base)
    kinds = {each["kind"]: each for each in made if each["kind"] != "NetworkPolicy"}
    template = (kinds.get("Deployment") or kinds["DaemonSet"])["spec"]["template"]
    (port,) = containers(template)["keyferry-agent"]["ports"]
    assert port == {"name": "metrics", "containerPort": 9464}
    monitor = kinds["PodMonitor"]["spec"]
    assert [each["port"] for each in monitor["podMetricsEndpoints"]] == ["metrics"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = [
        port["port"]
        for each in made
        if each["kind"] == "NetworkPolicy"
        for rule in each["spec"].get("ingress", [])
        for port in rule["ports"]
    ]
    assert ports == ([9464] if base == "daemonset" else [])
