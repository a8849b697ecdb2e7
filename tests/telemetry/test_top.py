"""`outrider top` shows the programs' metrics, and names those that do not answer."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from outrider.cli.top import Watched
from outrider.cli.top_view import view
from outrider.errors import Unavailable
from outrider.telemetry.scraping import Change, Scrape
from tests.cli.processes import run
from tests.stack import eventually, request
from tests.telemetry.parts import at_rest, prompt, scrape, services, unused_port

LONG = {"temperature": 0, "ignore_eos": True, "max_tokens": 60}


def shown(watched: list[Watched]) -> str:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(view(watched))
    return re.sub(r" +", " ", captured.get())


async def test_it_shows_requests_speculation_and_replicas(redis_url: str) -> None:
    async with services(redis_url, {"metrics_port": 0}) as system:
        assert system.draft is not None
        servers = (system.orchestrator, system.target, system.draft)
        watched = [Watched(f"127.0.0.1:{server.metrics_port}", 10.0) for server in servers]
        for program in watched:
            await program.scrape()
        assert "tokens/s 0 " in shown(watched)
        num_tokens = 0
        async for chunk in system.client.Generate(request(prompt(1), LONG), timeout=150):
            num_tokens += len(chunk.token_ids)

        async def is_over() -> bool:
            exposed = await scrape(system.orchestrator)
            return exposed("outrider_requests_total", status="OK") == 1

        await eventually(is_over)
        for server in servers:
            await at_rest(server)
        for program in watched:
            await program.scrape()
        change = watched[0].change
        assert change is not None
        assert change.increase("outrider_generation_tokens_total") == num_tokens == 60
        text = shown(watched)
    assert "still starting" not in text
    for words in ("streams 0", "queued 0", "failed 0", "redis up", "target ready 1"):
        assert words in text
    assert re.search(r"acceptance \d+%", text)
    assert re.search(r"tokens/drafted round \d\.\d\d", text)
    assert re.search(r"target 127\.0\.0\.1:\d+ ready 0 0 0% 0 ", text)
    assert re.search(r"draft 127\.0\.0\.1:\d+ ready 0 0 0% 0 ", text)


async def test_an_address_that_does_not_answer_is_named(redis_url: str) -> None:
    telemetry = {"metrics_port": 0}
    with unused_port() as port:
        async with services(redis_url, telemetry, has_draft=False, gamma=0) as system:
            ports = (port, system.target.metrics_port)
            watched = [Watched(f"127.0.0.1:{p}", 10.0) for p in ports]
            for program in watched:
                await program.scrape()
            text = shown(watched)
    assert f"no metrics at 127.0.0.1:{port}" in text
    assert "target 127.0.0.1" in text


def test_no_answer_at_all_is_an_error() -> None:
    with unused_port() as port:
        with pytest.raises(Unavailable, match=f"no metrics at 127.0.0.1:{port}"):
            Scrape.of(f"127.0.0.1:{port}")
        done = run("top", "--once", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"no metrics at 127.0.0.1:{port}" in done.stderr


def _scrape(at: float, counts: dict[str, float]) -> Scrape:
    buckets = {frozenset({("le", bound)}): count for bound, count in counts.items()}
    return Scrape("x", at, {"h_bucket": buckets, "n_total": {frozenset(): counts["+Inf"]}})


@pytest.mark.parametrize(("share", "expected"), [(0.25, 0.5), (0.5, 1.0), (0.75, 1.5), (0.99, 2)])
def test_quantiles_equal_prometheus(share: float, expected: float) -> None:
    """Observations between two scrapes: ten up to 1, ten up to 2."""
    before = _scrape(0.0, {"1.0": 5.0, "2.0": 5.0, "+Inf": 5.0})
    after = _scrape(2.0, {"1.0": 15.0, "2.0": 25.0, "+Inf": 25.0})
    change = Change(before, after)
    assert change.quantile("h", share) == pytest.approx(expected, abs=0.03)
    assert change.rate("n_total") == 10.0


def test_a_counter_that_fell_was_restarted() -> None:
    before, after = _scrape(0.0, {"+Inf": 50.0}), _scrape(1.0, {"+Inf": 3.0})
    assert Change(before, after).increase("n_total") == 3.0
