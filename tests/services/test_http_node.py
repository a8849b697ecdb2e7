"""The official OpenAI client for Node: endpoints, streams, errors, aborts; skipped without Node."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from outrider.tokenizer import Tokenizer
from tests.node_packages import installed
from tests.services.parts import Greedy, Pair, nothing_held, whole
from tests.stack import eventually

NUM_TOKENS = 24


@pytest.mark.slow
async def test_the_client_for_node(
    chat_pair: Pair, chat_greedy: Greedy, redis_url: str, tmp_path: Path
) -> None:
    """The same answers with drafts and without, and the target's own; nothing is left running."""
    folder = await asyncio.to_thread(installed, Path(__file__).parent / "node", tmp_path)
    async with whole(chat_pair, redis_url, tokenizer=str(chat_pair.target), http_port=0) as stack:
        process = await asyncio.create_subprocess_exec(
            "node", str(folder / "calls.mjs"), f"http://{stack.http_endpoint}/v1",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        said, _ = await process.communicate()
        await eventually(lambda: nothing_held(stack))
    assert process.returncode == 0
    found = json.loads(said)
    assert found["models"] == [str(chat_pair.target)]
    for how in ("greedy", "seeded"):
        plain, drafted = found[how]["0"], found[how]["4"]
        for name in ("whole", "chat"):
            assert drafted[name] == plain[name]
        for answers in (plain, drafted):
            assert answers["stream"]["text"] == answers["whole"]
            assert answers["chatStream"]["text"] == answers["chat"]
            assert answers["stream"]["usage"]["completion_tokens"] == NUM_TOKENS
        assert plain["stream"]["speculation"]["num_draft_tokens"] == 0
        assert drafted["chatStream"]["speculation"]["num_draft_tokens"] > 0
    tokenizer = Tokenizer.load(str(chat_pair.target))
    assert tokenizer is not None
    ids = tokenizer.encode("the quick")
    detokenizer = tokenizer.detokenizer(ids)
    text = "".join(detokenizer.push(token) for token in chat_greedy(ids, NUM_TOKENS))
    assert found["greedy"]["4"]["whole"] == text + detokenizer.finish()
    assert [one["index"] for one in found["several"]] == [0, 1, 2]
    assert {(one["numTokens"], one["numTop"]) for one in found["several"]} == {(NUM_TOKENS, 2)}
    assert len(set(found["biased"])) == 1
    assert found["stopped"]["finish_reason"] == "stop"
    assert [(one["name"], one["status"], one["param"]) for one in found["refusals"]] == [
        ("BadRequestError", 400, "temprature"),
        ("BadRequestError", 400, "messages"),
        ("NotFoundError", 404, "model"),
    ]
