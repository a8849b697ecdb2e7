"""Cluster: pods of each workload, endpoints of Services, and their DNS records."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.deploy.cluster.kubelet import RunningPod
from tests.deploy.cluster.names import NameServer
from tests.deploy.cluster.sandbox import DOMAIN, Sandbox
from tests.deploy.manifests import Manifests, Pod, selects


class Cluster:
    """Running pods of an overlay. `tasks` runs them."""

    def __init__(
        self,
        manifests: Manifests,
        sandbox: Sandbox,
        names: NameServer,
        log_directory: Path,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.pods: list[RunningPod] = []
        self.gone: list[RunningPod] = []
        self._manifests = manifests
        self._sandbox = sandbox
        self._names = names
        self._log_directory = log_directory
        self._tasks = tasks
        self._changed = asyncio.Event()

    def workload(self, component: str) -> Pod:
        label = "app.kubernetes.io/component"
        return next(p for p in self._manifests.pods() if p.labels.get(label) == component)

    def running(self, component: str) -> list[RunningPod]:
        """Pods of a component in start order, terminating ones included."""
        return [pod for pod in self.pods if pod.pod.name == self.workload(component).name]

    def apply(self) -> None:
        """Starts all workloads with their number of replicas at the same time."""
        for pod in self._manifests.pods():
            for _ in range(pod.workload["spec"].get("replicas", 1)):
                self._add(pod)

    def add(self, component: str) -> RunningPod:
        return self._add(self.workload(component))

    def _add(self, pod: Pod) -> RunningPod:
        ordinal = len([each for each in self.pods + self.gone if each.pod.name == pod.name])
        name = f"{pod.workload['metadata']['name']}-{ordinal}"
        made = RunningPod(
            name, pod, self._manifests, self._sandbox, self._log_directory, self._on_change
        )
        made.prepare()
        self.pods.append(made)
        self._on_change()
        self._tasks.create_task(made.run(), name=name)
        return made

    async def remove(self, pod: RunningPod) -> None:
        """Stops a pod and returns when it has exited."""
        await pod.stop()
        self.pods.remove(pod)
        self.gone.append(pod)

    async def ready(self, *pods: RunningPod, timeout_s: float) -> None:
        """Waits until these pods, or all, are ready. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not all(pod.is_ready for pod in pods or self.pods):
                self._changed.clear()
                await self._changed.wait()

    def endpoints(self, service: str) -> list[str]:
        """Current addresses of a Service: ready pods, or all if it publishes others too."""
        spec = self._manifests.get("Service", service)["spec"]
        return [
            pod.address
            for pod in self.pods
            if selects(spec["selector"], pod.pod.labels)
            and not pod.is_terminating
            and (pod.is_ready or spec.get("publishNotReadyAddresses"))
        ]

    def _on_change(self) -> None:
        records: dict[str, list[str]] = {}
        for service in self._manifests.of("Service"):
            name = service["metadata"]["name"]
            addresses = records[f"{name}.{DOMAIN}"] = self.endpoints(name)
            for pod in self.pods:
                if pod.address in addresses:
                    records[f"{pod.name}.{name}.{DOMAIN}"] = [pod.address]
        self._names.records = records
        self._changed.set()
