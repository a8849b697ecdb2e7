"""Kubelet of one pod: volumes, containers in order, probes, restarts, graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.deploy.cluster.probing import Probe
from tests.deploy.cluster.sandbox import IMAGE_ENVIRONMENT, Place, Sandbox
from tests.deploy.manifests import Manifests, Pod, files

# Shorter than the kubelet's 10 s.
RESTART_AFTER_S = 1.0


class RunningPod:
    """One pod and its processes. Calls `on_change` when its readiness changes."""

    def __init__(
        self,
        name: str,
        pod: Pod,
        manifests: Manifests,
        sandbox: Sandbox,
        log_directory: Path,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.pod = pod
        self.is_ready = False
        self.is_terminating = False
        self.num_restarts = 0
        self.exit_statuses: list[int] = []
        self.stopped_in_s: float | None = None
        self._manifests = manifests
        self._sandbox = sandbox
        self._log_directory = log_directory
        self._on_change = on_change
        self._place: Place | None = None
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        security = pod.spec["securityContext"]
        self._uid, self._gid = security["runAsUser"], security["runAsGroup"]

    @property
    def address(self) -> str:
        assert self._place is not None
        return self._place.address

    @property
    def grace_s(self) -> float:
        return float(self.pod.spec.get("terminationGracePeriodSeconds", 30))

    def prepare(self) -> None:
        """Creates network, root and volumes."""
        place = self._place = self._sandbox.place(self.name)
        sources = {volume["name"]: volume for volume in self.pod.spec.get("volumes", ())}
        seen: set[str] = set()
        for container in self.pod.all_containers:
            for mount in container.get("volumeMounts", ()):
                if mount["mountPath"] in seen:
                    continue
                seen.add(mount["mountPath"])
                source = sources.get(mount["name"], {})
                if source.keys() & {"configMap", "secret"}:
                    given = files(self._manifests, source)
                    self._sandbox.mount_files(place, mount["mountPath"], given, self._gid)
                else:
                    self._sandbox.mount_empty(place, mount["mountPath"], self._gid)
        self._sandbox.seal(place)

    async def run(self) -> None:
        """Runs until the pod is stopped; restarts containers that exit."""
        for container in self.pod.spec.get("initContainers", ()):
            process = await self._start(container)
            assert await process.wait() == 0, f"{self.name}: {container['name']} failed"
        async with asyncio.TaskGroup() as tasks:
            for container in self.pod.containers:
                tasks.create_task(self._keep(container), name=f"{self.name} {container['name']}")

    async def _keep(self, container: dict[str, Any]) -> None:
        while not self.is_terminating:
            process = await self._start(container)
            probing = asyncio.create_task(self._probe(container, process))
            try:
                self.exit_statuses.append(await process.wait())
            finally:
                probing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await probing
            self._set_ready(False)
            if not self.is_terminating:
                self.num_restarts += 1
                await asyncio.sleep(RESTART_AFTER_S)

    async def _start(self, container: dict[str, Any]) -> asyncio.subprocess.Process:
        assert self._place is not None
        fields = {
            "status.podIP": self.address,
            "metadata.name": self.name,
            "metadata.namespace": self.pod.workload["metadata"]["namespace"],
        }
        given = self._manifests.environment(container, fields)
        command = [*container["command"], *container.get("args", ())]
        with (self._log_directory / f"{self.name}.{container['name']}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._place.inside(command, self._uid, self._gid),
                env={**IMAGE_ENVIRONMENT, **given},
                cwd="/tmp",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes[container["name"]] = process
        return process

    async def _probe(self, container: dict[str, Any], process: asyncio.subprocess.Process) -> None:
        """Runs the startup probe, then readiness and liveness probes in parallel."""
        ports = self.pod.ports()

        def probe(kind: str) -> Probe | None:
            asks = container.get(kind)
            return Probe(asks, self.address, ports) if asks else None

        startup = probe("startupProbe")
        if startup is not None and not await _succeeds(startup):
            process.kill()
            return
        async with asyncio.TaskGroup() as tasks:
            if readiness := probe("readinessProbe"):
                tasks.create_task(self._readiness(readiness))
            if liveness := probe("livenessProbe"):
                tasks.create_task(self._liveness(liveness, process))

    async def _readiness(self, probe: Probe) -> None:
        num_failed = 0
        while True:
            num_failed = 0 if await probe.ask() else num_failed + 1
            if num_failed == 0 or num_failed >= probe.failure_threshold:
                self._set_ready(num_failed == 0)
            await asyncio.sleep(probe.period_s)

    async def _liveness(self, probe: Probe, process: asyncio.subprocess.Process) -> None:
        num_failed = 0
        while num_failed < probe.failure_threshold:
            await asyncio.sleep(probe.period_s)
            if self.is_terminating:
                return
            num_failed = 0 if await probe.ask() else num_failed + 1
        process.kill()

    async def stop(self) -> None:
        """Like `kubectl delete pod`: leaves its Services, then preStop, SIGTERM, SIGKILL."""
        begun = time.monotonic()
        self.is_terminating = True
        self._on_change()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.grace_s):
                for container in self.pod.containers:
                    await self._pre_stop(container)
                for process in self._processes.values():
                    _send(process, signal.SIGTERM)
                for process in self._processes.values():
                    await process.wait()
        self.kill()
        for process in self._processes.values():
            await process.wait()
        self.stopped_in_s = time.monotonic() - begun

    def kill(self) -> None:
        """Kills all processes; they are not restarted."""
        self.is_terminating = True
        for process in self._processes.values():
            _send(process, signal.SIGKILL)

    async def _pre_stop(self, container: dict[str, Any]) -> None:
        hook = container.get("lifecycle", {}).get("preStop", {})
        if command := hook.get("exec", {}).get("command"):
            assert self._place is not None
            process = await asyncio.create_subprocess_exec(
                *self._place.inside(command, self._uid, self._gid), env=IMAGE_ENVIRONMENT
            )
            status = await process.wait()
            assert status == 0, f"{self.name}: preStop: exit status {status}"

    def _set_ready(self, is_ready: bool) -> None:
        if is_ready != self.is_ready:
            self.is_ready = is_ready
            print(f"{self.name}: {'ready' if is_ready else 'not ready'}", file=sys.stderr)
            self._on_change()


async def _succeeds(probe: Probe) -> bool:
    for _ in range(probe.failure_threshold):
        if await probe.ask():
            return True
        await asyncio.sleep(probe.period_s)
    return False


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.kill(process.pid, number)
