"""Fixtures of the security tests: a real Redis, and a certificate authority."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import orchestrator.admission.shared_quota
from tests import redis_fixture
from tests.patience import patient
from tests.security.parts import Authority

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    """Long timeouts, also for shared quotas: a slow Redis is not away."""
    with patient(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(orchestrator.admission.shared_quota, "REDIS_TIMEOUT_S", 60.0)
        yield


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")
