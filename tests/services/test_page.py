"""The page at `/` in a real browser: playground, comparison, errors, keys, accessibility.

The pictures in docs/images are of a running `outrider up`:
OUTRIDER_SCREENSHOTS=http://127.0.0.1:8000/ pytest -n 0 tests/services/test_page.py -k picture
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from PIL import Image
from playwright.async_api import Browser, Page, async_playwright, expect

from outrider.redis.embedded import RedisServer
from outrider.security.keys import KeyLimits
from tests.security.parts import write_keys
from tests.services.http_client import asked, get, post
from tests.services.parts import Brake, Pair, System, both_tiers, nothing_held, orchestrating
from tests.stack import eventually

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOWN = os.environ.get("OUTRIDER_SCREENSHOTS")
WAIT_MS = 60_000
NUM_TOKENS = 24
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stacks(
    chat_pair: Pair, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[System, System, str]]:
    """Two orchestrators of the same tiers; the second one requires a key, which is the third."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    keys = write_keys(file, ada=KeyLimits())
    settings: dict[str, Any] = {"tokenizer": str(chat_pair.target), "http_port": 0}
    async with (
        both_tiers(chat_pair) as tiers,
        orchestrating(tiers, redis_server.url, **settings) as stack,
        orchestrating(tiers, redis_server.url, api_keys_file=str(file), **settings) as keyed,
    ):
        yield stack, keyed, keys["ada"]


@pytest.fixture
def stack(stacks: tuple[System, System, str]) -> System:
    return stacks[0]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, stack: System) -> AsyncIterator[Page]:
    """The page, without a script error or a request to elsewhere until the end of the test."""
    page = await browser.new_page(viewport={"width": 1280, "height": 860}, device_scale_factor=1.5)
    page.set_default_timeout(WAIT_MS)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if "Policy" in line.text else None)
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    await page.goto(f"http://{stack.http_endpoint}/")
    await expect(page.locator("#model option")).to_have_count(1, timeout=WAIT_MS)
    yield page
    assert wrong == []
    assert all(host.startswith("127.0.0.1:") for host in hosts), hosts
    await page.close()


async def generate(page: Page, prompt: str, **fields: str) -> None:
    """Fills in the form and submits it. `fields`: values by the inputs' ids."""
    await page.fill("#prompt", prompt)
    for name, value in {"max_tokens": str(NUM_TOKENS), **fields}.items():
        await page.fill(f"#{name.replace('_', '-')}", value)
    await page.click("#generate")


async def ended(page: Page) -> None:
    await expect(page.locator("#stop")).to_be_disabled(timeout=WAIT_MS)


async def texts(page: Page, selector: str) -> list[str]:
    return await page.locator(selector).all_text_contents()


@needs_browser
async def test_a_request_runs_with_drafts_and_again_without(page: Page, stack: System) -> None:
    """The tokens are those of the API; the figures follow from them."""
    await generate(page, "the quick", gamma="3")
    await ended(page)
    assert "the same" in await page.inner_text("#verdict"), await page.inner_text("#error")
    body = {"prompt": "the quick", "max_tokens": NUM_TOKENS, "temperature": 0}
    _, answer = await post(stack, "/v1/completions", {**body, "gamma": 0})
    (choice,) = answer["choices"]
    with_drafts, without = (f"article >> nth={n} >> .token" for n in (0, 1))
    assert "".join(await texts(page, with_drafts)) == choice["text"]
    assert "".join(await texts(page, without)) == choice["text"]
    origins = {
        name: await page.locator(f"{with_drafts}.{name}").count()
        for name in ("accepted", "recovered", "bonus", "plain")
    }
    assert sum(origins.values()) == answer["usage"]["completion_tokens"]
    assert origins["accepted"] > 0
    shown = await texts(page, "#origins .num:nth-child(2)")
    assert list(map(int, shown)) == list(origins.values())
    rows = [
        row.split() for row in await page.locator("#positions-table tbody tr").all_inner_texts()
    ]
    assert sum(int(row[1]) for row in rows) == origins["accepted"]
    assert await page.locator(f"{without}.plain").count() == sum(origins.values())
    assert await page.locator("#rounds g").count() >= sum(origins.values())


@needs_browser
async def test_a_token_shows_its_log_probability_and_round(page: Page) -> None:
    """To the pointer, and to the keyboard and a screen reader."""
    await page.uncheck("#compare")
    await generate(page, "the quick", gamma="3")
    await ended(page)
    await page.locator("article .token").nth(5).hover()
    detail = page.locator("article .detail").first
    assert re.match(r'6: ".*" · \w+ · round \d+ .*log-probability −\d', await detail.inner_text())
    tokens = page.locator("article .tokens").first
    await tokens.focus()
    await tokens.press("Home")
    await tokens.press("ArrowRight")
    assert (await detail.inner_text()).startswith("2: ")
    assert await page.inner_text("#announcement") == await detail.inner_text()
    await tokens.press("End")
    assert (await detail.inner_text()).startswith(f"{NUM_TOKENS}: ")
    await tokens.press("ArrowUp")
    at = int((await detail.inner_text()).partition(":")[0])
    assert 1 <= at < NUM_TOKENS


@needs_browser
async def test_a_chat_goes_on(page: Page) -> None:
    await page.uncheck("#compare")
    await page.get_by_text("Chat", exact=True).click()
    await generate(page, "the fox")
    await ended(page)
    answer = "".join(await texts(page, "article >> nth=0 >> .token"))
    assert await page.input_value("#prompt") == ""
    await page.locator("article .token").nth(1).hover()
    assert "log-probability" in await page.locator("article .detail").first.inner_text()
    await generate(page, "and then")
    await ended(page)
    assert await texts(page, "#turns p") == ["the fox", answer]
    await page.click("#new-chat")
    await expect(page.locator("#turns")).to_be_hidden()


@needs_browser
async def test_stop_ends_the_generation_at_the_server(
    page: Page, stack: System, brake: Brake
) -> None:
    brake.set(5)
    await generate(page, "the quick", max_tokens="1000")
    await page.locator("article .token").first.wait_for()
    await page.keyboard.press("Escape")
    await ended(page)
    await eventually(lambda: nothing_held(stack))
    brake.release()
    assert await page.inner_text("#verdict") == "Stopped."
    assert await page.inner_text("article .status >> nth=0") == "stopped"


@needs_browser
@pytest.mark.parametrize(("field", "value"), [("gamma", "99"), ("seed", "x")])
async def test_an_error_names_its_field(field: str, value: str, page: Page) -> None:
    await generate(page, "the", **{field: value})
    error = page.locator("#error")
    await expect(error).to_contain_text(f"{field}: ", timeout=WAIT_MS)
    assert await page.get_attribute(f"#{field}", "aria-invalid") == "true"
    await page.fill(f"#{field}", "")
    await page.click("#generate")
    await ended(page)
    await expect(error).to_be_hidden()


@needs_browser
async def test_an_unreachable_orchestrator_is_reported(page: Page) -> None:
    await page.context.set_offline(True)
    await generate(page, "the")
    error = page.locator("#error")
    await expect(error).to_have_text("the orchestrator cannot be reached", timeout=WAIT_MS)
    assert await page.inner_text("article .status >> nth=0") == "failed"


@needs_browser
async def test_a_key_is_asked_for_and_kept_in_memory(
    page: Page, stacks: tuple[System, System, str]
) -> None:
    _, keyed, key = stacks
    await page.goto(f"http://{keyed.http_endpoint}/")
    await expect(page.locator("#error")).to_contain_text("HTTP 401", timeout=WAIT_MS)
    assert await page.get_attribute("#api-key", "aria-invalid") == "true"
    assert await page.inner_text("#replicas-note") == "Enter an API key to see the replicas."
    await page.fill("#api-key", key)
    await page.press("#api-key", "Tab")
    await expect(page.locator("#replicas tbody tr")).to_have_count(2, timeout=WAIT_MS)
    await expect(page.locator("#error")).to_be_hidden()
    await generate(page, "the")
    await ended(page)
    assert "the same" in await page.inner_text("#verdict")
    kept = await page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]")
    assert kept == ["", 0, 0]


@needs_browser
async def test_no_rule_of_accessibility_is_violated(page: Page) -> None:
    """Of axe, in light and dark, wide and narrow, with a finished generation and an error."""
    await generate(page, "the quick")
    await ended(page)
    await page.locator("article .token").nth(4).hover()
    for scheme in SCHEMES:
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        results = await Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
    await page.set_viewport_size({"width": 380, "height": 800})
    await generate(page, "x", gamma="99")
    await expect(page.locator("#error")).to_be_visible(timeout=WAIT_MS)
    results = await Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    width = await page.evaluate("document.documentElement.scrollWidth")
    assert width <= 380, "the page scrolls sideways"


@needs_browser
@pytest.mark.skipif(SHOWN is None, reason="OUTRIDER_SCREENSHOTS names no page")
async def test_pictures_of_the_page(page: Page) -> None:
    await page.goto(str(SHOWN))
    await generate(page, "def read(self", max_tokens="128")
    await expect(page.locator("#stop")).to_be_disabled(timeout=4 * WAIT_MS)
    await page.locator("article .token.recovered").first.hover()
    for scheme in SCHEMES:
        await page.emulate_media(color_scheme=scheme)
        file = ROOT / f"docs/images/page-{scheme}.png"
        with Image.open(io.BytesIO(await page.screenshot(full_page=True))) as image:
            # A third of its size.
            image.convert("RGB").quantize(128).save(file, optimize=True)


async def test_the_page_has_a_strict_policy_and_no_way_out(stack: System) -> None:
    files = {f"/page/{file.name}" for file in (ROOT / "orchestrator/http/static").iterdir()}
    files = files - {"/page/index.html"} | {"/"}
    assert len(files) >= 8
    named = set()
    for path in files:
        answer = await asked(stack.http_endpoint, "GET", path)
        assert answer.status == 200
        policy, content = answer.headers["content-security-policy"], answer.content.decode()
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert re.findall(r"https?://(?!www\.w3\.org/)", content) == []
        named |= {f"/page/{name}" for name in re.findall(r'"(?:page/|\./)([\w.]+)"', content)}
        current = {"if-none-match": answer.headers["etag"]}
        again = await asked(stack.http_endpoint, "GET", path, headers=current)
        assert (again.status, again.content) == (304, b"")
    assert named == files - {"/"}
    assert (await get(stack, "/page/nothing.js"))[0] == 404


async def test_replicas_are_listed_with_state_load_and_acceptance(
    stacks: tuple[System, System, str],
) -> None:
    stack, keyed, key = stacks
    body = {"prompt": "the", "max_tokens": NUM_TOKENS, "gamma": 3, "temperature": 0}
    assert (await post(stack, "/v1/completions", body))[0] == 200
    status, answer = await get(stack, "/v1/replicas")
    assert (status, answer["object"]) == (200, "list")
    target, draft = answer["data"]
    assert (target["tier"], draft["tier"]) == ("target", "draft")
    for replica in (target, draft):
        assert (replica["state"], replica["refused"]) == ("ready", None)
        assert replica["num_generations"] == replica["num_own_generations"] == 0
        assert replica["kv_capacity_tokens"] > 0
    assert target["acceptance_rate"] is None
    assert 0 <= draft["acceptance_rate"] <= 1
    assert (await get(keyed, "/v1/replicas"))[0] == 401
    bearer = {"authorization": f"Bearer {key}"}
    answered = await asked(keyed.http_endpoint, "GET", "/v1/replicas", headers=bearer)
    assert (answered.status, len(answered.body["data"])) == (200, 2)
