"""A real Redis, and an authority with certificates of everybody, for the tests of security."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import redis_fixture
from tests.security.parts import Authority

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")
