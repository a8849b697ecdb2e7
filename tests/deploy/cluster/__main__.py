"""Runs one of the scenarios on an overlay's pods.

The last line of standard output is the result, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.deploy.cluster.control import Cluster
from tests.deploy.cluster.load import Load
from tests.deploy.cluster.names import NameServer
from tests.deploy.cluster.sandbox import NODE_ADDRESS, Sandbox
from tests.deploy.cluster.scenarios import SCENARIOS
from tests.deploy.manifests import Manifests


async def main(scenario: str, manifests: Manifests, sandbox: Sandbox, logs: Path) -> None:
    load = Load()
    async with asyncio.TaskGroup() as tasks:
        names = NameServer()
        await names.start(NODE_ADDRESS)
        cluster = Cluster(manifests, sandbox, names, logs, tasks)
        result = await SCENARIOS[scenario](cluster, load)
        result["num_restarts"] = {pod.name: pod.num_restarts for pod in cluster.pods + cluster.gone}
        for pod in cluster.pods:
            pod.kill()
    outputs = {prompt: len(found) for prompt, found in load.outputs.items()}
    print(json.dumps({**result, **asdict(load), "outputs": outputs}), flush=True)


if __name__ == "__main__":
    name, overlay, directory = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for folder in ("mounts", "logs"):
        (directory / folder).mkdir()
    made = Sandbox(directory / "mounts")
    made.prepare()
    asyncio.run(main(name, Manifests.parse(overlay.read_text("utf-8")), made, directory / "logs"))
