"""A local Kubernetes API server from envtest's binaries (KUBEBUILDER_ASSETS)."""

from __future__ import annotations

import random
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

START_TIMEOUT_S = 120.0


@contextmanager
def api_server(assets: Path, directory: Path) -> Iterator[list[str]]:
    """Starts etcd and the API server; yields the kubectl command with its credentials."""
    etcd, peer, api = free_ports(3)
    token = secrets.token_hex(16)
    (directory / "tokens.csv").write_text(f'{token},admin,1,"system:masters"\n', "utf-8")
    key = directory / "accounts.key"
    subprocess.run(
        ["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True, timeout=60
    )
    commands = (
        [
            assets / "etcd", f"--data-dir={directory / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}", "--unsafe-no-fsync",
        ],
        [
            assets / "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1", f"--secure-port={api}",
            f"--cert-dir={directory / 'certificates'}", "--service-cluster-ip-range=10.0.0.0/24",
            "--authorization-mode=RBAC", f"--token-auth-file={directory / 'tokens.csv'}",
            "--service-account-issuer=https://localhost",
            f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
        ],
    )  # fmt: skip
    kubectl = [
        "kubectl", f"--server=https://127.0.0.1:{api}", "--insecure-skip-tls-verify",
        f"--token={token}", f"--cache-dir={directory / 'cache'}",
    ]  # fmt: skip
    with ExitStack() as stack:
        for command in commands:
            log = stack.enter_context((directory / f"{Path(command[0]).name}.log").open("wb"))
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        _wait(kubectl)
        yield kubectl


def _wait(kubectl: list[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    ask = [*kubectl, "get", "--raw=/readyz"]
    while subprocess.run(ask, capture_output=True, timeout=30, check=False).returncode:
        assert time.monotonic() < deadline, "the API server does not become ready"
        time.sleep(0.2)


def free_ports(num: int) -> list[int]:
    """Distinct ports without a listener, outside the range that the kernel assigns by itself."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first_given = int(given.read_text("utf-8").split()[0]) if given.exists() else 49_152
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < num:
            port = random.randrange(10_000, max(first_given, 10_001 + num))
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found
