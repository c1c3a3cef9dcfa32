"""A cluster's handling of deploy/'s manifests, as far as a pod in podman needs it: render, make a pod, mount secrets."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from .skip_unless import ROOT

DEPLOY = ROOT / "deploy"
Manifest: TypeAlias = dict[str, Any]


def rendered(folder: Path) -> str:
    """Return the output of `kubectl kustomize` for a folder."""
    return subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout


def overlay(folder: Path, base: Path, images: Mapping[str, str]) -> Path:
    """Make an operator's folder on top of a base, which sets the images."""
    folder.mkdir()
    lines = [
        f"  - {{name: {name}, newName: {image.split(':')[0]}, newTag: {image.split(':')[1]}}}"
        for name, image in images.items()
    ]
    text = "\n".join(["resources:", f"  - {os.path.relpath(base, folder)}", "images:", *lines, ""])
    (folder / "kustomization.yaml").write_text(text)
    return folder


def containers(pod: Manifest) -> dict[str, Manifest]:
    """All containers of a pod, or of a template of pods, by name."""
    spec = pod["spec"]
    return {container["name"]: container for container in [*spec.get("initContainers", []), *spec["containers"]]}


def pod_of(documents: list[Manifest], name: str) -> Manifest:
    """The pod that the controller among these manifests would make."""
    (template,) = (
        document["spec"]["template"] for document in documents if document["kind"] in {"Deployment", "DaemonSet"}
    )
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": name},
        "spec": template["spec"],
    }


def for_podman(pod: Manifest, mounted: Mapping[str, Path]) -> Manifest:
    """Change a pod where podman 4 differs from a kubelet. `mounted`: folders for secrets and for paths of the host."""
    spec = pod["spec"]
    # It waits for every init container to end, sidecars too.
    sidecars = [container for container in spec.get("initContainers", []) if container.pop("restartPolicy", None)]
    spec["initContainers"] = [container for container in spec.get("initContainers", []) if container not in sidecars]
    spec["containers"] = [*sidecars, *spec["containers"]]
    if spec["initContainers"]:
        spec["restartPolicy"] = "OnFailure"  # as Always, it starts those again and again that have done their work
    for volume in spec["volumes"]:
        if "secret" in volume:
            # It does not decode secrets, and never updates them: a folder of the host, laid out as the kubelet does.
            volume["hostPath"] = {"path": str(mounted[volume.pop("secret")["secretName"]]), "type": "Directory"}
        elif "hostPath" in volume:
            # The machine's own /run is left alone.
            volume["hostPath"]["path"] = str(mounted[volume["hostPath"]["path"]])
        elif "emptyDir" in volume:
            # podman's volumes are on disk, whatever their medium, and their first user owns them: see `Podman.play`.
            del volume["emptyDir"]
            volume["persistentVolumeClaim"] = {"claimName": f"{pod['metadata']['name']}-{volume['name']}"}
    return pod


class MountedSecret:
    """A secret as the kubelet mounts and updates it: names that are links through `..data`, which is replaced as a whole."""

    def __init__(self, folder: Path, gid: int) -> None:
        self.folder = folder
        self._gid = gid
        self._number = 0
        folder.mkdir()
        folder.chmod(0o755)

    def update(self, files: Mapping[str, Path]) -> None:
        """Mount new content. Modes are those of defaultMode 0440 and fsGroup."""
        old, self._number = self._folder(), self._number + 1
        new = self._folder()
        new.mkdir(mode=0o755)
        for name, source in files.items():
            shutil.copyfile(source, new / name)
            shutil.chown(new / name, 0, self._gid)
            (new / name).chmod(0o440)
        (self.folder / "..data_tmp").symlink_to(new.name)
        (self.folder / "..data_tmp").replace(self.folder / "..data")
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        shutil.rmtree(old, ignore_errors=True)

    def _folder(self) -> Path:
        return self.folder / f"..2026_{self._number}"


def parsed(text: str) -> list[Manifest]:
    """The manifests in a text."""
    return [document for document in yaml.safe_load_all(text) if document]
