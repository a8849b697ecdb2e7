"""The real Redis of these tests."""

from __future__ import annotations

from tests import redis_fixture

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url
