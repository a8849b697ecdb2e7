"""Model pairs, made once for all tests of the services."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import outrider.model_server.lifecycle
from orchestrator.generation.target_session import TargetSession
from orchestrator.speculation.verification import VerifyResult
from tests import redis_fixture
from tests.patience import patient
from tests.services.parts import CONTEXT_LEN, Brake, Greedy, Pair, System, both_tiers, clients
from tests.services.replicas import Fault, Gate
from tests.services.tokenizer_files import write_tokenizer
from tests.tiny_models import make_tiny_draft, make_tiny_model

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url


@pytest.fixture(scope="package", autouse=True)
def _patience() -> Iterator[None]:
    """A test of a neighbour that is away sets its own limits."""
    with patient():
        yield


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Without tokenizer; 256 tokens, of which the last is the end of sequence."""
    root = tmp_path_factory.mktemp("pair")
    target = make_tiny_model("llama", root / "target", max_position_embeddings=CONTEXT_LEN)
    return Pair(target, make_tiny_draft(target, root / "draft"))


@pytest.fixture(scope="session")
def chat_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With a byte-level tokenizer and a chat template."""
    root = tmp_path_factory.mktemp("chat_pair")
    target = make_tiny_model(
        "llama", root / "target", vocab_size=300, seed=5, max_position_embeddings=CONTEXT_LEN
    )
    pair = Pair(target, make_tiny_draft(target, root / "draft"))
    for directory in pair:
        write_tokenizer(directory)
    return pair


@pytest.fixture(scope="session")
def greedy(pair: Pair) -> Greedy:
    return Greedy(pair.target)


@pytest.fixture(scope="session")
def draft_greedy(pair: Pair) -> Greedy:
    return Greedy(pair.draft)


@pytest.fixture(scope="session")
def chat_greedy(chat_pair: Pair) -> Greedy:
    return Greedy(chat_pair.target)


@pytest.fixture
async def system(pair: Pair) -> AsyncIterator[System]:
    """Both tiers, without an orchestrator; the draft with little room."""
    async with both_tiers(pair, draft_kv=4096) as tiers, clients(tiers) as system:
        yield system


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Of the engine of each tier that is started."""
    gate = Gate()
    _serve_with(monkeypatch, gate.engine)
    return gate


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """Of the engine of each tier that is started."""
    fault = Fault()
    _serve_with(monkeypatch, fault.engine)
    return fault


def _serve_with(monkeypatch: pytest.MonkeyPatch, make_engine: Callable[..., Any]) -> None:
    load = outrider.model_server.lifecycle.load_served_engine
    monkeypatch.setattr(
        outrider.model_server.lifecycle,
        "load_served_engine",
        lambda config: load(config)._replace(engine=make_engine(config)),
    )


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Brake:
    """Of all generations of the orchestrators in this process."""
    brake, reply = Brake(), TargetSession.reply

    async def braked(verifying: TargetSession) -> VerifyResult:
        await brake.passed(verifying._state.num_output_tokens)
        return await reply(verifying)

    monkeypatch.setattr(TargetSession, "reply", braked)
    return brake
