"""What honest peers send, to be spoilt, and a few frames that only somebody hostile would write.

Knows the three services' contracts; sends nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from outrider.runtime.grpc_options import MAX_REQUEST_BYTES
from outrider.v1 import draft_pb2, orchestrator_pb2, sampling_pb2, target_pb2
from tests.fuzz.values import GENERATION_IDS, SESSION_IDS, tokens
from tests.services.streams import draft_commit, draft_open, ids, row, sizes, target_open
from tests.stack import request

VOCAB_SIZE = 256
_NUM_MANY = 100_000


@dataclass(frozen=True)
class Dialect:
    """One method of one service.

    `script`: frames of an honest conversation, in order. `absurd`: frames that are well-formed.
    """

    method: str
    request: type[Message]
    response: type[Message]
    script: Callable[[random.Random], list[Any]]
    absurd: Callable[[random.Random], Message]


def some_tokens(chance: random.Random, least: int = 1, most: int = 40) -> list[int]:
    return [chance.randrange(VOCAB_SIZE) for _ in range(chance.randint(least, most))]


def some_sampling(chance: random.Random) -> sampling_pb2.SamplingParams:
    """Greedy or sampled, now and then with all that there is."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "seed": chance.randrange(99)},
        {"temperature": 1, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"temperature": 1e-45, "repetition_penalty": chance.choice((1e-45, 1e-40, 10.0))},
        {"temperature": 100, "frequency_penalty": -2, "presence_penalty": 2, "logprobs": 20},
        {"logit_bias": {7: 100.0, 8: -100.0}, "min_tokens": 1, "max_tokens": 9},
        {"allowed_token_ids": [3, 255], "stop_token_ids": [9], "ignore_eos": True, "logprobs": 0},
        {"top_p": 1e-45, "min_p": 1e-45, "seed": 2**64 - 1},
        {"bad_words_token_ids": [{"ids": [3]}, {"ids": [5, 6]}], "prompt_logprobs": 3},
    ]
    return sampling_pb2.SamplingParams(**chance.choice(kinds))


def _target_script(chance: random.Random) -> list[target_pb2.VerifyRequest]:
    number, prompt = chance.choice(GENERATION_IDS), some_tokens(chance)
    size, gamma = len(prompt), chance.randrange(1, 7)
    opening = target_open(
        number,
        session_id=chance.choice(SESSION_IDS),
        epoch=chance.randrange(4),
        kept_epoch=chance.randrange(4),
        prompt_len=size,
        max_len=size + chance.randrange(1, 300),
        sampling=some_sampling(chance),
    )
    support = {
        "support_sizes": sizes([2] * gamma),
        "support_ids": ids([1, 2] * gamma),
    }
    drafts = some_tokens(chance, gamma, gamma)
    rows = [
        row(number, 0, prompt, with_prompt_logprobs=chance.random() < 0.3),
        row(number, size, [5], drafts, **(support if chance.random() < 0.5 else {})),
        row(number, max(0, size - 1), [prompt[-1], 5, 6]),
    ]
    close = target_pb2.TargetClose(generation_id=number, keep=chance.random() < 0.5)
    frames = [target_pb2.VerifyRequest(opens=[opening], rows=rows[:1])]
    frames += [target_pb2.VerifyRequest(rows=[each]) for each in rows[1:]]
    return [*frames, target_pb2.VerifyRequest(closes=[close], forget_session_ids=["fuzz-0"])]


def _draft_script(chance: random.Random) -> list[draft_pb2.ProposeRequest]:
    number, prompt = chance.choice(GENERATION_IDS), some_tokens(chance)
    opening = draft_open(
        number,
        prompt,
        session_id=chance.choice(SESSION_IDS),
        epoch=chance.randrange(4),
        max_len=len(prompt) + chance.randrange(2, 300),
        sampling=some_sampling(chance),
        verification=chance.randrange(4),
        gamma=chance.randrange(5),
        ahead_gamma=chance.randrange(5),
        lookahead=chance.randrange(5),
        fan_out=chance.choice((0, 1, 4, 32)),
        vocab_size=chance.choice((VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE + 9, 2**32 - 1)),
    )
    frames, size = [draft_pb2.ProposeRequest(opens=[opening])], len(prompt)
    for _ in range(chance.randrange(4)):
        new = some_tokens(chance, 1, 5)
        size += len(new)
        commit = draft_commit(number, new, size, gamma=chance.randrange(5))
        frames.append(draft_pb2.ProposeRequest(commits=[commit]))
    close = draft_pb2.DraftClose(generation_id=number, keep=chance.random() < 0.5)
    return [*frames, draft_pb2.ProposeRequest(closes=[close], forget_session_ids=["fuzz-0"])]


def _absurd_sampling(chance: random.Random) -> sampling_pb2.SamplingParams:
    many = range(_NUM_MANY)
    kinds: list[dict[str, Any]] = [
        {"stop_token_ids": many},
        {"allowed_token_ids": many},
        {"allowed_token_ids": [1] * _NUM_MANY},
        {"logit_bias": dict.fromkeys(range(5_000), math.nan)},
        {"logit_bias": {2**32 - 1: 1.0}},
        {"stop": ["x"] * 10_000},
        {"bad_words": ["x"] * 10_000},
        {"bad_words_token_ids": [{"ids": [1] * 300}]},
        {"bad_words_token_ids": [{"ids": [2**32 - 1]}], "prompt_logprobs": 2**32 - 1},
        {"stop": ["x" * _NUM_MANY]},
        {"temperature": math.nan, "top_p": math.inf, "top_k": -(2**31), "min_p": -math.inf},
        {"max_tokens": 2**32 - 1, "min_tokens": 2**32 - 1, "logprobs": 2**32 - 1},
    ]
    return sampling_pb2.SamplingParams(**chance.choice(kinds))


def _absurd_rows(chance: random.Random) -> list[target_pb2.VerifyRow]:
    number = chance.choice(GENERATION_IDS)
    drafts, supports = ids([1, 2]), ids(range(_NUM_MANY))
    wide = sizes([65535, _NUM_MANY - 65535])
    many = [target_pb2.VerifyRow(generation_id=n) for n in range(3_000)]
    return chance.choice(
        [
            [row(number, 0, [1], (), draft_token_ids=tokens([1]) * _NUM_MANY)],
            [row(number, 0, [1], [1, 2], support_sizes=wide, support_ids=supports)],
            [row(number, 0, [1], (), draft_token_ids=drafts, support_sizes=b"\1" * _NUM_MANY)],
            [row(number, 2**32 - 1, [2**32 - 1] * 9, [2**32 - 1])],
            [row(number, 0, [1] * _NUM_MANY)],
            [row(number, 1, [1], with_prompt_logprobs=True)],
            many,
        ]
    )


def _target_absurd(chance: random.Random) -> target_pb2.VerifyRequest:
    number = chance.choice(GENERATION_IDS)
    match chance.randrange(5):
        case 0:
            return target_pb2.VerifyRequest(rows=_absurd_rows(chance))
        case 1:
            opening = target_open(number, sampling=_absurd_sampling(chance))
        case 2:
            opening = target_open(number, max_len=2**32 - 1, prompt_len=2**32 - 2, epoch=2**64 - 1)
        case 3:
            opening = target_open(number, session_id="x" * 1_000_000)
        case _:
            closes = [target_pb2.TargetClose(generation_id=n) for n in range(20_000)]
            return target_pb2.VerifyRequest(closes=closes)
    return target_pb2.VerifyRequest(opens=[opening, opening])


def _draft_absurd(chance: random.Random) -> draft_pb2.ProposeRequest:
    number, most = chance.choice(GENERATION_IDS), 2**32 - 1
    openings: list[dict[str, Any]] = [
        {"sampling": _absurd_sampling(chance)},
        {"gamma": most, "ahead_gamma": most},
        {"lookahead": most, "fan_out": most},
        {"lookahead": 16, "fan_out": most, "ahead_gamma": 16, "max_len": most, "epoch": 2**64 - 1},
        {"vocab_size": most, "sampling": sampling_pb2.SamplingParams(logit_bias={1: 1.0})},
        {"token_ids": tokens([1]) * _NUM_MANY, "prompt_len": most},
        {"session_id": "x" * 1_000_000},
    ]
    if chance.random() < 0.3:
        commit = draft_commit(number, tokens([1]) * _NUM_MANY, most, gamma=most, ahead_gamma=most)
        return draft_pb2.ProposeRequest(commits=[commit] * chance.choice((1, 50)))
    opening = draft_open(number, [1, 2, 3], **chance.choice(openings))
    return draft_pb2.ProposeRequest(opens=[opening, opening])


def _calls(chance: random.Random) -> list[orchestrator_pb2.GenerateRequest]:
    """Turns of one session, the first of which makes it."""
    named: dict[str, Any] = {}
    if chance.random() < 0.6:
        named = {"session_id": chance.choice(SESSION_IDS), "create_session": True}
    turns = []
    for _ in range(chance.randint(1, 2)):
        sampling = {"max_tokens": chance.randrange(1, 40), "ignore_eos": True}
        if chance.random() < 0.5:
            sampling |= {"temperature": 0}
        turn = request(some_tokens(chance), sampling, verification=chance.randrange(4), **named)
        for field, most in (("gamma", 8), ("lookahead", 4), ("fan_out", 8)):
            if chance.random() < 0.3:
                setattr(turn, field, chance.randint(1, most))
        turns.append(turn)
    return turns


def _absurd_call(chance: random.Random) -> orchestrator_pb2.GenerateRequest:
    call = orchestrator_pb2.GenerateRequest(sampling=some_sampling(chance))
    match chance.randrange(6):
        case 0:
            call.token_ids.ids.extend([1] * 1_000_000)
        case 1:
            call.text = "x" * 5_000_000
        case 2:
            call.chat.messages.extend([orchestrator_pb2.ChatMessage(role="user")] * _NUM_MANY)
        case 3:
            call.chat.messages.add(role="r" * 1_000_000, content="x")
        case 4:
            call.token_ids.ids.append(1)
            call.sampling.CopyFrom(_absurd_sampling(chance))
        case _:
            call.session_id = "x" * 1_000_000
    return call


def oversize() -> bytes:
    """A message that no server takes."""
    return b"\x0a" + bytes(MAX_REQUEST_BYTES)


TARGET = Dialect(
    "/outrider.v1.TargetService/Verify",
    target_pb2.VerifyRequest,
    target_pb2.VerifyResponse,
    _target_script,
    _target_absurd,
)
DRAFT = Dialect(
    "/outrider.v1.DraftService/Propose",
    draft_pb2.ProposeRequest,
    draft_pb2.ProposeResponse,
    _draft_script,
    _draft_absurd,
)
ORCHESTRATOR = Dialect(
    "/outrider.v1.OrchestratorService/Generate",
    orchestrator_pb2.GenerateRequest,
    orchestrator_pb2.GenerateResponse,
    _calls,
    _absurd_call,
)


def session_ids(message: Message) -> Sequence[str]:
    """The names that it may leave something under."""
    if isinstance(message, orchestrator_pb2.GenerateRequest):
        return [message.session_id]
    return [opening.session_id for opening in getattr(message, "opens", ())]


def fingerprints(message: Message) -> Sequence[str]:
    """Fingerprint of the target whose sessions at a draft the message names; usually none."""
    if isinstance(message, draft_pb2.ProposeRequest) and message.HasField("target"):
        return [message.target.model_fingerprint]
    return []
