"""The record of a rollout: roles of revisions, what operators may do, malformed records."""

from __future__ import annotations

import json

import pytest

from outrider.draft_rollout import Role, Rollout, revision_name
from outrider.errors import ConfigError


def test_a_revision_is_named_by_its_fingerprint() -> None:
    assert revision_name("0123456789abcdef" * 4) == "0123456789ab"
    assert revision_name("simulated-32000-0") == "simulated-32000-0"
    assert revision_name("") == "unknown"


def test_roles() -> None:
    canary = Rollout(1, current="a", trial="b", superseded=("c",), rolled_back=("d",))
    roles = [canary.role(name) for name in "abcde"]
    assert roles == [Role.CURRENT, Role.CANARY, Role.SUPERSEDED, Role.ROLLED_BACK, Role.WAITING]
    assert canary.revisions == ("a", "b", "d", "c")
    assert Rollout(1, current="b", trial="a", is_promoted=True).role("a") is Role.CONTROL


def test_a_record_survives_json_and_ignores_fields_of_later_releases() -> None:
    record = Rollout(3, "a", "b", True, ("c",), ("d",), "b promoted")
    fields = json.loads(record.to_json()) | {"later": 1}
    assert Rollout.from_json(json.dumps(fields).encode()) == record


@pytest.mark.parametrize(
    "record",
    [
        b"", b"[]", b"{}", b'{"version": 0}', b'{"version": true}', b'{"version": 1, "current": 2}',
        b'{"version": 1, "rolled_back": "a"}', b'{"version": 1, "superseded": [1]}', b"[" * 100_000,
        json.dumps({"version": 1, "rolled_back": ["a"] * 100}).encode(),
    ],
)  # fmt: skip
def test_a_malformed_record_is_refused(record: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Rollout.from_json(record)


def test_the_operator_promotes() -> None:
    record = Rollout(1, current="a", trial="b").promote("b")
    assert (record.version, record.current, record.trial) == (2, "b", "")
    assert record.role("a") is Role.SUPERSEDED
    assert record.promote("b").role("a") is Role.SUPERSEDED, "again changes nothing"


def test_the_operator_promotes_a_revision_that_was_rolled_back() -> None:
    record = Rollout(1, current="a", rolled_back=("b",)).promote("b")
    assert record.role("b") is Role.CURRENT
    assert record.rolled_back == ()


def test_the_operator_rolls_back_the_canary_or_the_current_revision() -> None:
    canary = Rollout(1, current="a", trial="b").roll_back("b")
    assert (canary.current, canary.trial, canary.rolled_back) == ("a", "", ("b",))
    promoted = Rollout(1, current="b", trial="a", is_promoted=True).roll_back("b")
    assert (promoted.current, promoted.trial, promoted.rolled_back) == ("a", "", ("b",))
    waiting = Rollout(1, current="a", trial="b").roll_back("c")
    assert (waiting.trial, waiting.is_promoted, waiting.rolled_back) == ("b", False, ("c",))


def test_the_only_revision_cannot_be_rolled_back() -> None:
    with pytest.raises(ConfigError, match="promote another revision"):
        Rollout(1, current="a").roll_back("a")


def test_a_revision_may_be_tried_again() -> None:
    record = Rollout(1, current="a", superseded=("b",), rolled_back=("c",)).retry("c").retry("b")
    assert record.version == 3
    assert record.role("b") is record.role("c") is Role.WAITING
    with pytest.raises(ConfigError, match="current, not rolled back"):
        record.retry("a")
