"""A client in another language, generated from the .proto files, runs `Generate`.

It is Node with grpc-js, which shares no code with the C core of Python's gRPC. The tests are
skipped if Node or its packages are unavailable.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from outrider.client.channel import Access
from outrider.security.keys import KeyLimits
from tests.cli import conftest as cli
from tests.node_packages import installed
from tests.security.parts import (
    Authority,
    client,
    generated,
    orchestrated,
    secured,
    tiers,
    write_keys,
)
from tests.stack import running_stack

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent / "node"
EXAMPLE = ROOT / "examples/grpc_node"
target, draft = cli.target, cli.draft
REQUEST = {
    "token_ids": {"ids": [5, 6, 7]},
    "sampling": {"temperature": 0, "ignore_eos": True, "max_tokens": 40},
    "gamma": 4,
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client and its packages."""
    return installed(SOURCE, tmp_path_factory.mktemp("node"))


async def run(node: Path, endpoint: str, ca: str = "", key: str = "") -> Any:
    """JSON that the client printed."""
    arguments = [str(node / "generate.mjs"), endpoint, str(ROOT / "proto"), *([ca] if ca else [])]
    process = await asyncio.create_subprocess_exec(
        "node",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "OUTRIDER_API_KEY": key},
    )
    said, _ = await process.communicate(json.dumps(REQUEST).encode())
    assert process.returncode == 0
    return json.loads(said)


def token_ids(said: Any) -> list[int]:
    return [token for message in said["messages"] for token in message["token_ids"]]


@pytest.mark.slow
async def test_generate_in_plain_text(node: Path, redis_url: str) -> None:
    """The same tokens as with the Python client, and the result."""
    async with tiers() as servers, orchestrated(servers, redis_url) as system:
        said = await run(node, system.endpoint)
        async with client(system.endpoint) as stub:
            output = await generated(stub, (5, 6, 7), num_tokens=40)
    assert said["code"] == "OK"
    assert token_ids(said) == output.token_ids
    result = said["messages"][-1]["result"]
    assert result["finish_reason"] == "FINISH_REASON_LENGTH"
    assert result["usage"] == {"prompt_tokens": 3, "completion_tokens": 40}
    assert result["speculation"]["num_drafts"] > 0


@pytest.mark.slow
async def test_the_example(
    node: Path, target: Path, draft: Path, redis_url: str, tmp_path: Path
) -> None:
    """With the packages of its own package.json, which are the client's."""
    dependencies = [
        json.loads((folder / "package.json").read_text("utf-8"))["dependencies"]
        for folder in (SOURCE, EXAMPLE)
    ]
    assert dependencies[0] == dependencies[1]
    example = tmp_path / "examples/grpc_node"
    shutil.copytree(EXAMPLE, example)
    (example / "node_modules").symlink_to(node / "node_modules")
    (tmp_path / "proto").symlink_to(ROOT / "proto")
    async with running_stack(target, draft, redis_url, tokenizer=str(target)) as stack:
        process = await asyncio.create_subprocess_exec(
            "node", str(example / "generate.mjs"), stack.endpoint,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        shown, complaint = await process.communicate()
    assert (process.returncode, complaint) == (0, b"")
    assert b"acceptance rate: " in shown


async def test_generate_over_tls_with_a_key(
    node: Path, authority: Authority, redis_url: str
) -> None:
    """Refused without either of them."""
    keys = write_keys(authority.folder / "keys", ada=KeyLimits())
    file = str(authority.folder / "keys")
    async with secured(authority, redis_url, api_keys_file=file) as system:
        stranger = Authority(authority.folder / "stranger")
        said, no_key, wrong_key, wrong_ca, plain = await asyncio.gather(
            run(node, system.endpoint, authority.ca, keys["ada"]),
            run(node, system.endpoint, authority.ca),
            run(node, system.endpoint, authority.ca, "guess"),
            run(node, system.endpoint, stranger.ca, keys["ada"]),
            run(node, system.endpoint, key=keys["ada"]),
        )
        async with client(system.endpoint, Access(authority.ca, api_key=keys["ada"])) as stub:
            output = await generated(stub, (5, 6, 7), num_tokens=40)
    assert (said["code"], token_ids(said)) == ("OK", output.token_ids)
    assert [no_key["code"], wrong_key["code"]] == ["UNAUTHENTICATED"] * 2
    assert [wrong_ca["code"], plain["code"]] == ["UNAVAILABLE"] * 2
