"""Malformed values for each field of a session's hash, for tests: session `s`."""

from __future__ import annotations

from collections.abc import Callable

from tests.redis_fixture import redis_command

KEY, TOKENS = "outrider:session:{s}", "outrider:session:{s}:tokens"
SAVED = ("saved:{s}", "saved:{s}:tokens")

NUMBERS = [
    "version",
    "epoch",
    "lease_epoch",
    "lease_until",
    "num_tokens",
    "num_turns",
    "turn_epoch",
    "begun_by",
    "orphan",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
    "num_emitted_tokens",
]
TEXTS = ["model", "created_by", "owner", "resumes", "messages", "turn", "target_kv", "draft_kv"]
# Values in quotes, as of a line that is typed into redis-cli.
JUNK = [
    '""',
    '"abc"',
    '"-1"',
    '"1.5"',
    '"1e3"',
    '"0x10"',
    '"nan"',
    '"inf"',
    '" 7"',
    '"9007199254740992"',
    f'"{"9" * 400}"',
    r'"\xff\xfe\x00"',
    '"null"',
    '"[1]"',
    r'"[{\"role\":5}]"',
    r'"{\"a\":1}"',
    '"5 -1 target:0"',
    f'"{"9" * 30} 3 target:0"',
]


def redis_hash(redis_url: str, key: str = KEY) -> bytes:
    return redis_command(redis_url, "HGETALL", key)


def keeper(redis_url: str) -> Callable[[str, str], bytes]:
    """Saves session s; returns a function that restores it with one field changed."""
    for key, copy in zip((KEY, TOKENS), SAVED, strict=True):
        redis_command(redis_url, "COPY", key, copy, "REPLACE")

    def restore(name: str, value: str) -> bytes:
        redis_command(redis_url, "DEL", KEY, TOKENS)
        for key, copy in zip((KEY, TOKENS), SAVED, strict=True):
            redis_command(redis_url, "COPY", copy, key, "REPLACE")
        assert redis_command(redis_url, "HSET", KEY, name, value) in (b":0", b":1")
        return redis_hash(redis_url)

    return restore
