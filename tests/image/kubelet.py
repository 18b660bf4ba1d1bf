"""What of a kubelet it takes to run a pod of the manifests here: containers in order, volumes, settings, confinement.

Every container has this machine's network. A volume is a directory, owned as fsGroup would have it.
"""

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from tests.image.containers import environment, run, succeeds
from tests.manifests.rendering import Manifest, Manifests, Pod
from tests.waiting import wait_until


class Kubelet:
    """Runs the containers of one pod; leaving it as a context manager removes them."""

    def __init__(self, manifests: Manifests, pod: Pod, image: str, directory: Path, name: str) -> None:
        self._manifests = manifests
        self._pod = pod
        self._image = image
        self._directory = directory
        self._name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for container in self._pod.containers():
            succeeds("podman", "rm", "--force", "--time", "0", self._container(container))

    def start(self) -> None:
        """All of them: each init container to its end, or, as a sidecar, until its startup probe has succeeded."""
        for container in self._pod.spec.get("initContainers", []):
            if container.get("restartPolicy") == "Always":
                self._run(container, "--detach")
                probe = container["startupProbe"]["exec"]["command"]
                ask = partial(succeeds, "podman", "exec", self._container(container), *probe)
                wait_until(ask, 30, f"the startup probe of {container['name']}")
            else:
                self._run(container)
        for container in self._pod.spec["containers"]:
            self._run(container, "--detach")

    def wait(self, name: str, timeout: float) -> int:
        """The exit code of a container."""
        return int(run("podman", "wait", f"{self._name}-{name}", timeout=timeout))

    def stop(self, name: str) -> int:
        """As Kubernetes stops it, within the pod's grace period; its exit code."""
        grace = str(self._pod.spec["terminationGracePeriodSeconds"])
        run("podman", "stop", "--time", grace, f"{self._name}-{name}")
        return self.wait(name, 10)

    def log(self, name: str) -> str:
        """Standard output and standard error."""
        done = subprocess.run(
            ["podman", "logs", f"{self._name}-{name}"], env=environment(), capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def volume(self, name: str) -> Path:
        """The directory that stands for it."""
        return self._directory / name

    def _container(self, container: Manifest) -> str:
        return f"{self._name}-{container['name']}"

    def _run(self, container: Manifest, *how: str) -> None:
        command = [*container.get("command", []), *container.get("args", [])]
        # Kubernetes' `command` takes the place of the image's entrypoint.
        entrypoint = ["--entrypoint", json.dumps(container["command"][:1])] if "command" in container else []
        arguments = [self._expanded(str(each)) for each in command[1 if entrypoint else 0 :]]
        where = ["--workdir", container["workingDir"]] if "workingDir" in container else []
        run(
            *("podman", "run", *how, "--name", self._container(container), "--network", "host"),
            *(*self._confinement(container), *where),
            *(f"--env={name}={value}" for name, value in self._environment(container).items()),
            *(argument for mount in container.get("volumeMounts", []) for argument in self._mounted(mount)),
            *(*entrypoint, self._image, *arguments),
        )

    def _confinement(self, container: Manifest) -> Iterator[str]:
        pod, own = self._pod.spec["securityContext"], container["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert not own["allowPrivilegeEscalation"]
        yield from ("--user", f"{pod['runAsUser']}:{pod['runAsGroup']}", "--read-only", "--read-only-tmpfs=false")
        yield from ("--security-opt", "no-new-privileges")
        yield from (f"--cap-drop={name}" for name in own["capabilities"]["drop"])
        yield from ("--memory", container["resources"]["limits"]["memory"].replace("Mi", "m"))

    def _environment(self, container: Manifest) -> Mapping[str, str]:
        settings = self._manifests.settings() if container.get("envFrom") else {}
        return {**settings, **{each["name"]: self._name for each in container.get("env", [])}}

    def _expanded(self, text: str) -> str:
        return re.sub(r"\$\(JOB_NAME\)", self._name, text)

    def _mounted(self, mount: Manifest) -> tuple[str, str]:
        (volume,) = (each for each in self._pod.spec["volumes"] if each["name"] == mount["name"])
        directory = self.volume(volume["name"])
        if not directory.exists():
            self._make(directory, volume)
        return "--volume", f"{directory}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"

    def _make(self, directory: Path, volume: Mapping[str, Any]) -> None:
        group = self._pod.spec["securityContext"]["fsGroup"]
        directory.mkdir()
        if "secret" in volume:
            for key, value in self._data_of(volume["secret"]).items():
                (directory / key).write_bytes(base64.b64decode(value))
                (directory / key).chmod(volume["secret"]["defaultMode"])
                os.chown(directory / key, 0, group)
        os.chown(directory, 0, group)
        directory.chmod(0o2775)

    def _data_of(self, secret: Mapping[str, Any]) -> Mapping[str, str]:
        """Its keys and their values in base64; one that is optional may be missing, and is an empty directory then."""
        found = [each for each in self._manifests.of("Secret") if each["metadata"]["name"] == secret["secretName"]]
        if not found and secret.get("optional"):
            return {}
        (only,) = found
        data: Mapping[str, str] = only["data"]
        return data
