"""The pods of deploy/, run by podman: applications get their keys during rotations, kills and stops.

No kubelet runs here. `support/manifests.py` does the part of it that matters to the agent.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from support.agent import PATIENCE
from support.keyring import change, run
from support.manifests import DEPLOY, MountedSecret, containers, for_podman, overlay, parsed, pod_of, rendered
from support.podman import AGENT_IMAGE, Podman
from support.skip_unless import base_image, program, root

from keyferry.module import SoftwareModule

pytestmark = [
    root(),
    base_image(),
    program("kubectl", "kubernetes-client"),
    *(program(name, name) for name in ("podman", "runc", "catatonit")),
]
IMAGE = f"{AGENT_IMAGE}:test"
AGENT_GID = 10_001
APPLICATION = (Path(__file__).parent / "application.py").read_text()
DESCRIBE = ("keyferry", "call", "DescribeKey", "--KeyId", "alias/orders")


class Pods:
    """Pods of one base, with the secrets that they mount."""

    def __init__(self, podman: Podman, folder: Path, base: Path) -> None:
        self.podman = podman
        self.keyring = folder / "keyring.age"
        run("init", self.keyring, "--new-identity", folder / "identity")
        change(self.keyring, "create-key", "--alias", "alias/orders")
        self.secret = MountedSecret(folder / "keyferry-keyring", AGENT_GID)
        identity = MountedSecret(folder / "keyferry-identity", AGENT_GID)
        identity.update({"identity": folder / "identity"})
        self.mount_keyring()
        self.mounted = {path.name: path for path in (self.secret.folder, identity.folder)}
        self._folder = folder
        images = dict.fromkeys(("keyferry-agent", "orders", "reports"), IMAGE)
        self._rendered = parsed(rendered(overlay(folder / "overlay", base, images)))

    def mount_keyring(self) -> None:
        """Give the secret the content of the keyring, as the kubelet does some time after it was applied."""
        self.secret.update({"keyring.age": self.keyring})

    def play_base(self, name: str) -> None:
        """Run the pod of the base."""
        pod = pod_of(self._rendered, name)
        configuration = [document for document in self._rendered if document["kind"] == "ConfigMap"]
        self.play(pod, configuration)

    def play(self, pod: dict[str, Any], configuration: Sequence[dict[str, Any]] = ()) -> None:
        """Run a pod, whose applications wait for their input."""
        pod = for_podman(pod, self.mounted)
        made = containers(pod)
        for name in {"orders", "reports"} & set(made):
            made[name].update(image=IMAGE, command=["sleep", "infinity"])
        self.podman.play(pod, configuration, self._folder / f"{pod['metadata']['name']}.yaml")


class Load:
    """An application in a container, and its output. Entering the block waits for its first key."""

    def __init__(self, podman: Podman, container: str, wrapping_key_spec: str = "RSA_2048") -> None:
        self._process = podman.popen("exec", "-i", container, "python", "-c", APPLICATION, wrapping_key_spec)
        self._said: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self.wait_for("version")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next line about this."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        patience = threading.Timer(PATIENCE, self._process.kill)
        patience.start()
        try:
            for line in self._process.stdout:
                self._said.append(json.loads(line))
                if self._said[-1]["event"] == event:
                    return self._said[-1]
        finally:
            patience.cancel()
        raise AssertionError(f"no {event} in {self._said}: {self._process.stderr.read()}")

    def end(self) -> dict[str, Any]:
        """End the application, and return its totals."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait_for("sum")

    def interrupted(self) -> bool:
        """Return whether the application ever reported a missing agent."""
        return any(line["event"] == "unavailable" for line in self._said)

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        self._process.wait(PATIENCE)


def refusal(podman: Podman, container: str, *call: str) -> str:
    """The code of the error that a container's call is refused with."""
    ended = podman.run("exec", container, *call, check=False)
    assert ended.returncode == 1, ended.stderr
    return str(json.loads(ended.stderr)["Code"])


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman, with the image that deploy/Containerfile makes."""
    with Podman(tmp_path_factory.mktemp("podman")) as made:
        made.build_agent("test")
        yield made


@pytest.fixture(scope="module")
def sidecar(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Pods:
    """The pod of deploy/sidecar, serving."""
    pods = Pods(podman, tmp_path_factory.mktemp("sidecar"), DEPLOY / "sidecar")
    pods.play_base("app")
    podman.run("exec", "app-orders", "keyferry", "status", "--wait", "30")
    return pods


def test_image_has_no_build_tools_and_an_ordinary_user(podman: Podman) -> None:
    """The image has no compiler and no pip, and its numeric user has no meaning on other systems."""
    tools = ("cc", "gcc", "c++", "make", "pip", "pip3", "keyferry-agent")
    script = f'id -u; id -g; for tool in {" ".join(tools)}; do command -v "$tool"; done; true'
    said = podman.run("run", "--rm", "--network=none", "--entrypoint", "sh", IMAGE, "-c", script).stdout
    assert said.split() == ["10001", "10001", "/opt/keyferry/bin/keyferry-agent"]


def test_agent_without_capabilities_is_protected_in_64_kib(podman: Podman, sidecar: Pods) -> None:
    """Without capabilities, an agent has memfd_secret under the default seccomp profile, clears freed memory, and has SM2."""
    log = podman.log("app-keyferry-agent")
    assert [line["memory_protection"] for line in log if line["event"] == "agent.serving"] == ["memfd_secret"]
    assert not [line for line in log if line["event"].startswith("startup.")]
    status = podman.run("exec", "app-keyferry-agent", "cat", "/proc/1/status").stdout
    found = dict(line.split(":", 1) for line in status.splitlines())
    assert int(found["CapBnd"], 16) == 0
    assert found["NoNewPrivs"].strip() == "1"
    assert found["Seccomp"].strip() == "2"
    assert podman.run("exec", "app-keyferry-agent", "sh", "-c", "ulimit -l").stdout.strip() == "64"
    assert 36 < int(found["VmLck"].split()[0]) <= 64


@pytest.mark.parametrize("wrapping_key_spec", ["RSA_2048", "EC_SM2"])
def test_application_generates_uses_and_recovers_data_keys(
    podman: Podman, sidecar: Pods, wrapping_key_spec: str
) -> None:
    """An application does its main job through a socket in a shared volume that it mounts read-only."""
    with Load(podman, "app-orders", wrapping_key_spec) as application:
        done = application.end()
    assert done["keys"] > 0
    assert done["recovered"] == 2 * done["keys"]
    assert done["wrong"] == done["refused"] == 0


def test_container_has_only_the_grants_of_its_listener(podman: Podman, sidecar: Pods) -> None:
    """`reports` recovers what `orders` generated and generates nothing; neither of them gets a plaintext."""
    module = SoftwareModule.generate("RSA_2048")
    to_module = (
        *("--PublicKeyBlob", module.public_key_blob, "--WrappingKeySpec", module.wrapping_key_spec),
        *("--WrappingAlgorithm", module.wrapping_algorithm),
    )
    generate = ("keyferry", "call", "GenerateAndExportDataKey", "--KeyId", "alias/orders", *to_module)
    made = json.loads(podman.run("exec", "app-orders", *generate).stdout)
    sealed = module.encrypt(module.import_data_key(made["ExportedDataKey"]), b"plaintext")
    blob = ("--CiphertextBlob", made["CiphertextBlob"])
    recover = ("keyferry", "call", "ExportDataKey", *blob, *to_module)
    recovered = json.loads(podman.run("exec", "app-reports", *recover).stdout)
    assert module.decrypt(module.import_data_key(recovered["ExportedDataKey"]), sealed) == b"plaintext"
    assert refusal(podman, "app-reports", *generate) == "Forbidden.NoPermission"
    for container in ("app-orders", "app-reports"):
        assert refusal(podman, container, "keyferry", "call", "Decrypt", *blob) == "Forbidden.NoPermission"
        assert podman.run("exec", container, "ls", "/run/keyferry").stdout.split() == ["agent.sock"]
        assert "Read-only" in podman.run("exec", container, "rm", "/run/keyferry/agent.sock", check=False).stderr


def test_agent_sees_user_and_listener_but_no_process(podman: Podman, sidecar: Pods) -> None:
    """Containers of one pod have separate pid namespaces, so a sidecar's grants name listeners."""
    podman.run("exec", "app-orders", *DESCRIBE)
    (*_, record) = (line for line in podman.log("app-keyferry-agent") if line.get("operation") == "DescribeKey")
    assert {key: record[key] for key in ("listener", "uid", "pid", "unit")} == {
        "listener": "orders",
        "uid": 20_001,
        "pid": None,
        "unit": None,
    }


def test_rotated_keyring_secret_fails_no_request_under_load(podman: Podman, sidecar: Pods) -> None:
    """Under load, the application gets data keys of each new version, and its first CiphertextBlobs still open."""
    with Load(podman, "app-orders") as application:
        for _ in range(3):
            change(sidecar.keyring, "rotate", "alias/orders")
            sidecar.mount_keyring()
            application.wait_for("version")
        done = application.end()
    assert done["wrong"] == done["refused"] == 0
    assert not application.interrupted()


def test_killed_agent_returns_without_wrong_answers(podman: Podman, sidecar: Pods) -> None:
    """A restarted agent replaces the socket of the killed one, and clients reconnect by themselves."""
    with Load(podman, "app-orders") as application:
        for _ in range(2):
            os.kill(podman.inspect("app-keyferry-agent", ".State.Pid"), signal.SIGKILL)
            application.wait_for("unavailable")
            application.wait_for("answered")
        done = application.end()
    assert done["wrong"] == done["refused"] == 0


def test_every_probe_finds_a_serving_agent_well(podman: Podman, sidecar: Pods) -> None:
    """The probes succeed when they run like the kubelet's: in the agent's container, as its user."""
    agent = containers(pod_of(parsed(rendered(DEPLOY / "sidecar")), "app"))["keyferry-agent"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        said = podman.run("exec", "app-keyferry-agent", *agent[probe]["exec"]["command"])
        assert json.loads(said.stdout)["State"] == "Serving"


def test_the_liveness_probe_has_an_agent_restarted_that_hangs(podman: Podman, sidecar: Pods) -> None:
    """An agent restarts after the manifest's number of failures, and the application has its keys again."""
    hung = podman.inspect("app-keyferry-agent", ".State.Pid")
    os.kill(hung, signal.SIGSTOP)
    for _ in range(3):
        assert podman.inspect("app-keyferry-agent", ".State.Pid") == hung
        assert podman.run("healthcheck", "run", "app-keyferry-agent", check=False).returncode != 0
    podman.run("exec", "app-orders", "keyferry", "status", "--wait", "30")
    assert podman.inspect("app-keyferry-agent", ".State.Pid") != hung
    podman.run("exec", "app-orders", *DESCRIBE)


def test_one_agent_for_a_node_tells_pods_apart_by_their_user(podman: Podman, tmp_path: Path) -> None:
    """An agent of a node identifies pods by their users, and serves them through the mounted folder after a restart too."""
    pods = Pods(podman, tmp_path, DEPLOY / "daemonset")
    host = tmp_path / "run"
    host.mkdir(mode=0o755)
    pods.mounted["/run/keyferry"] = host
    pods.play_base("node")
    text = (DEPLOY / "daemonset" / "application.yaml").read_text()
    for name, uid in (("mine", 20_001), ("other", 20_002)):
        (pod,) = parsed(text)
        pod["metadata"]["name"] = name
        pod["spec"]["containers"][0]["securityContext"]["runAsUser"] = uid
        pods.play(pod)
    podman.run("exec", "mine-orders", "keyferry", "status", "--wait", "30")
    assert refusal(podman, "other-orders", *DESCRIBE) == "Forbidden.NoPermission"
    with Load(podman, "mine-orders") as application:
        os.kill(podman.inspect("node-keyferry-agent", ".State.Pid"), signal.SIGKILL)
        application.wait_for("unavailable")
        application.wait_for("answered")
        done = application.end()
    assert done["wrong"] == done["refused"] == 0


def test_metrics_of_the_image_are_served_on_the_pod_s_address(podman: Podman, tmp_path: Path) -> None:
    """The image has the packages for metrics, and serves them with the configuration of deploy/README.md."""
    base = tmp_path / "deploy"
    shutil.copytree(DEPLOY / "sidecar", base)
    page = (DEPLOY / "README.md").read_text().split("## Metrics")[1]
    lines = page.split("```toml\n")[1].split("```")[0].replace("\n   ", "\n").lstrip()
    with open(base / "agent.toml", "a") as file:
        file.write(f"\n{lines}\n")
    pods = Pods(podman, tmp_path, base)
    pods.play_base("metered")
    podman.run("exec", "metered-orders", "keyferry", "status", "--wait", "30")
    checked = podman.run("exec", "metered-keyferry-agent", "keyferry-agent", "check", "/etc/keyferry/config/agent.toml")
    assert (checked.stdout.partition(";")[0], checked.stderr) == ("/etc/keyferry/config/agent.toml: good", "")
    code = "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:9464/metrics').read().decode())"
    said = podman.run("exec", "metered-orders", "python", "-c", code).stdout
    assert "keyferry_keys 1.0" in said
    listening = podman.run("exec", "metered-orders", "cat", "/proc/net/tcp").stdout
    assert "00000000:24F8" in listening  # every address of the pod, port 9464
