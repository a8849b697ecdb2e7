"""Network and root filesystem per pod, from this machine's own files.

Must run in its own network, mount and PID namespaces: nothing is cleaned up, everything ends with
them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider.redis.embedded import find_server

ROOT = Path(__file__).parents[3]
NODE_ADDRESS = "10.117.0.1"
BRIDGE = "pods"
DOMAIN = "outrider.svc.cluster.local"
# Like the kubelet's resolv.conf.
_RESOLVER = f"""nameserver {NODE_ADDRESS}
search {DOMAIN} svc.cluster.local cluster.local
options ndots:5
"""
# Namespaces that end with their first process.
UNSHARE = (
    "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
    "--propagation", "private",
)  # fmt: skip
# Like the images (deploy/docker).
PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IMAGE_ENVIRONMENT = {"PATH": PATH, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run(*command: str) -> None:
    """Runs a command; its output goes to standard error. Raises CalledProcessError."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=30)


@dataclass(frozen=True)
class Place:
    """Network and root of a pod's containers."""

    name: str
    address: str
    root: Path

    def inside(self, command: Sequence[str], uid: int, gid: int) -> list[str]:
        """The command as the pod's user, without capabilities or new privileges."""
        return [
            "ip", "netns", "exec", self.name, "chroot", str(self.root),
            "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs",
            "--bounding-set=-all", "--inh-caps=-all", *command,
        ]  # fmt: skip


class Sandbox:
    """A network bridge, and the pods' mounts in `directory`, a tmpfs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._num_pods = 0

    def prepare(self) -> None:
        for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix)):
            # Otherwise no program is found, and the test waits in vain.
            assert not path.is_relative_to("/tmp"), f"{path}: each pod has a /tmp of its own"
        run("mount", "-t", "tmpfs", "tmpfs", str(self._directory))
        hosts, resolver = self._directory / "hosts", self._directory / "resolv.conf"
        hosts.write_text("127.0.0.1 localhost\n", "utf-8")
        resolver.write_text(_RESOLVER, "utf-8")
        Path("/run/netns").mkdir(exist_ok=True)
        run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")  # visible in this namespace only
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{NODE_ADDRESS}/16", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")

    def place(self, name: str) -> Place:
        """Creates a network and a root, writable until `seal`."""
        self._num_pods += 1
        address = f"10.117.1.{self._num_pods}"
        inner, outer = f"veth{self._num_pods}", f"pod{self._num_pods}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        run("ip", "link", "set", outer, "master", BRIDGE, "up")
        for words in (
            ("addr", "add", f"{address}/16", "dev", inner),
            ("link", "set", inner, "up"),
            ("link", "set", "lo", "up"),
        ):
            run("ip", "-n", name, *words)
        return Place(name, address, self._root(name))

    def _root(self, name: str) -> Path:
        own = self._directory / name
        upper, work, root = own / "upper", own / "work", own / "root"
        for path in (upper, work, root):
            path.mkdir(parents=True)
        options = f"lowerdir=/,upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "overlay", "-o", options, str(root))
        for path in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
            self._show(root, path)
        # Without valkey-cli a node that starts asks no sentinel, which is right for the first ones.
        for name, flag in (("server", ""), ("sentinel", " --sentinel")):
            program = root / f"usr/local/bin/valkey-{name}"
            program.unlink(missing_ok=True)
            program.write_text(f'#!/bin/sh\nexec {find_server()} "$@"{flag}\n', "utf-8")
            program.chmod(0o755)
        pair = root / "opt/outrider/pair"
        pair.parent.mkdir(parents=True, exist_ok=True)
        pair.symlink_to(ROOT / "outrider/quickstart_pair")
        for file in ("hosts", "resolv.conf"):
            self.mount_file(root, self._directory / file, f"/etc/{file}")
        return root

    def _show(self, root: Path, path: Path) -> None:
        """Makes a path visible in the root, also a mount of its own or one in a private home."""
        inside = root / path.relative_to("/")
        inside.mkdir(parents=True, exist_ok=True)
        for parent in (*inside.parents,):
            if parent == root:
                break
            parent.chmod(parent.stat().st_mode | 0o055)
        run("mount", "--rbind", str(path), str(inside))

    def mount_file(self, root: Path, source: Path, target: str) -> None:
        inside = root / target.lstrip("/")
        inside.touch()
        run("mount", "--bind", str(source), str(inside))

    def mount_empty(self, place: Place, target: str, gid: int) -> None:
        """An emptyDir, or a volume claimed: the pod's group may write."""
        inside = place.root / target.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        options = f"mode=2775,uid=0,gid={gid}"
        run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(inside))

    def mount_files(self, place: Place, target: str, files: Mapping[str, str], gid: int) -> None:
        """A ConfigMap or Secret: for the pod's group to read."""
        inside = place.root / target.lstrip("/")
        inside.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(inside))
        for name, text in files.items():
            (inside / name).write_text(text, "utf-8")
            os.chown(inside / name, 0, gid)
            (inside / name).chmod(0o440)
        run("mount", "-o", "remount,ro", str(inside))

    def seal(self, place: Place) -> None:
        """From now on the root is read-only; processes and devices are there."""
        run("mount", "-o", "remount,ro", str(place.root))
        run("mount", "-t", "proc", "proc", str(place.root / "proc"))
        run("mount", "--rbind", "/dev", str(place.root / "dev"))


def is_possible(directory: Path) -> bool:
    """Whether this process may make namespaces and mounts; tried, not guessed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    trial = (
        'mount -t tmpfs tmpfs "$0" && cd "$0" && mkdir u w r'
        ' && mount -t overlay overlay -o "lowerdir=/,upperdir=$0/u,workdir=$0/w" r'
        " && ip link add outrider0 type bridge && command -v setpriv chroot"
    )
    command = [*UNSHARE, "sh", "-c", trial, str(directory)]
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
