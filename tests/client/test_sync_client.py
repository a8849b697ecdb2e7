"""Client: blocking, from threads, inside a running event loop, and left without closing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from outrider.client import AsyncClient, CallFailed, Client
from tests.client.conftest import Place

PROMPT = "the quick"
NUM_TOKENS = 30
HEAVY = ("torch", "numpy", "structlog", "rich", "redis", "prometheus_client", "starlette", "jinja2")


@pytest.fixture
def client(place: Place) -> Iterator[Client]:
    with Client(place.endpoints) as client:
        yield client


def wait_until_free(client: Client) -> None:
    deadline = time.monotonic() + 60
    while client.list_sessions().sessions:
        assert time.monotonic() < deadline, "a generation is left"
        time.sleep(0.02)


def test_chunks_are_the_result(client: Client) -> None:
    stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
    token_ids = [token_id for chunk in stream for token_id in chunk.token_ids]
    assert token_ids == stream.result().token_ids == stream.output.token_ids
    assert len(token_ids) == NUM_TOKENS
    with pytest.raises(StopIteration):
        next(stream)


def test_short_requests(client: Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    client.chat(messages, session_id="sync", max_tokens=2).result()
    assert client.resume("sync", 1).result().usage.completion_tokens == 2
    assert client.get_session("sync").num_turns == 1
    client.delete_session("sync")
    assert client.models().target.vocab_size == 300
    assert client.audit().tests


def test_many_threads(client: Client) -> None:
    """Each has its own stream of the same client."""

    def generate(seed: int) -> list[int]:
        stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, seed=seed, verification="coupled")
        return [token_id for chunk in stream for token_id in chunk.token_ids]

    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(generate, [*range(8), *range(8)]))
    assert outputs[:8] == outputs[8:]
    assert len({tuple(output) for output in outputs}) > 1


async def test_inside_a_running_event_loop(place: Place) -> None:
    """As in a notebook; beside an AsyncClient of that loop."""
    async with AsyncClient(place.endpoints) as other:
        stream = other.generate(PROMPT, max_tokens=NUM_TOKENS, seed=2, verification="coupled")
        await anext(stream)
        with Client(place.endpoints) as client:
            again = client.generate(PROMPT, max_tokens=NUM_TOKENS, seed=2, verification="coupled")
            blocking = again.result()
        assert (await stream.result()).token_ids == blocking.token_ids


def test_leaving_the_loop_ends_the_generation(place: Place) -> None:
    with Client(place.slow) as client:
        for _ in client.generate(PROMPT, max_tokens=500, ignore_eos=True, gamma=0):
            break
        wait_until_free(client)
        with client.generate(PROMPT, max_tokens=500, ignore_eos=True, gamma=0) as stream:
            next(stream)
        wait_until_free(client)


def test_a_deadline_ends_the_generation(place: Place) -> None:
    with Client(place.slow) as client:
        stream = client.generate(PROMPT, max_tokens=500, ignore_eos=True, gamma=0, timeout_s=0.5)
        with pytest.raises(CallFailed, match=r"^DEADLINE_EXCEEDED: "):
            stream.result()
        wait_until_free(client)


def test_a_closed_client_refuses_requests(place: Place) -> None:
    client = Client(place.endpoints)
    client.close()
    client.close()
    with pytest.raises(CallFailed, match=r"^CANCELLED: the client is closed"):
        client.models()


def test_a_program_of_ten_lines(place: Place) -> None:
    """It imports nothing heavy, and ends although its client is left open in mid-stream."""
    program = f"""
import sys
from outrider.client import Client
client = Client({place.endpoints[0]!r})
stream = client.generate({PROMPT!r}, max_tokens=8, temperature=0, gamma=0)
print(next(stream).token_ids)
print(sorted(set(sys.modules) & set({HEAVY!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True
    )
    token_ids, heavy = done.stdout.splitlines()
    assert token_ids.startswith("[")
    assert heavy == "[]"
    assert done.stderr == ""
