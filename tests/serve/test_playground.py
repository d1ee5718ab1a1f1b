"""The playground in a real browser, on the real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.async_playwright import Axe
from harness import MODEL, Server
from playwright.async_api import ConsoleMessage, Page, async_playwright, expect

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

SHOTS = os.environ.get("TAILSERVE_SCREENSHOTS")
"""A folder to keep screenshots in, for somebody to look at."""


class Browser:
    """A page on the playground, and what its console said."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    async def open(self, url: str) -> None:
        await self.page.goto(url)
        await expect(self.page.locator("#model")).to_have_text(MODEL)

    async def settle(self, **options: str) -> None:
        await self.page.locator("#options summary").click()
        for name, value in options.items():
            await self.page.locator(f"#{name.replace('_', '-')}").fill(value)

    async def ask(self, text: str) -> None:
        await self.page.get_by_label("Message").fill(text)
        await self.page.get_by_role("button", name="Send").click()

    async def facts(self, turn: int) -> str:
        """What is said of a finished turn."""
        facts = self.page.locator("#turns > li").nth(turn).locator(".facts")
        await expect(facts).to_contain_text("tokens", timeout=60_000)
        return await facts.inner_text()

    async def answer(self, turn: int) -> str:
        return await self.page.locator("#turns > li").nth(turn).locator(".answer").inner_text()

    async def shoot(self, name: str) -> None:
        if SHOTS:
            await self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))

    async def check_accessibility(self) -> None:
        found = await Axe().run(self.page)
        assert found.violations_count == 0, found.generate_report()


@pytest.fixture
async def browser(server: Server) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        browser = Browser(await chromium.new_page(viewport={"width": 1280, "height": 800}))
        await browser.open(server.url)
        yield browser
        await chromium.close()


class Relay:
    """Stands between browser and server, and drops connections."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._server.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", self._port)
        pair = {writer, outer}
        self._writers |= pair
        await asyncio.gather(_pass_on(reader, outer), _pass_on(inner, writer))
        self._writers -= pair


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def relay(server: Server) -> AsyncIterator[Relay]:
    async with Relay(int(server.url.rsplit(":", 1)[1])) as relay:
        yield relay


async def running(server: Server) -> float:
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{server.url}/metrics")).text
    return sum(float(value) for value in re.findall(r"^tailserve_num_requests_running{.*} (\S+)$", text, re.MULTILINE))


async def until_running(server: Server, count: int) -> None:
    """Within 3 seconds."""
    deadline = asyncio.get_running_loop().time() + 3
    while (now := await running(server)) != count:
        assert asyncio.get_running_loop().time() < deadline, f"{now:.0f} sequences run, not {count}"
        await asyncio.sleep(0.05)


async def test_two_turns_of_a_chat(browser: Browser) -> None:
    await browser.settle(temperature="0", max_tokens="60")
    await browser.ask("What is gravity?")
    await expect(browser.page.locator(".writing").first).to_be_visible(timeout=30_000)
    assert "first token after" in await browser.facts(0)
    assert (await browser.answer(0)).startswith("Gravity is a")
    await expect(browser.page.locator(".writing")).to_have_count(0)
    await browser.ask("Who found it?")
    cached = re.search(r"(\d+) of (\d+) prompt tokens cached", await browser.facts(1))
    assert cached is not None
    assert int(cached[1]) > 0.7 * int(cached[2])
    await browser.shoot("chat-1280")
    await browser.check_accessibility()
    await browser.page.set_viewport_size({"width": 390, "height": 800})
    await browser.shoot("chat-390")
    assert await browser.page.evaluate("document.documentElement.scrollWidth") <= 390
    await browser.check_accessibility()
    await browser.page.reload()
    await expect(browser.page.locator("#turns > li")).to_have_count(2)
    assert browser.errors == []


async def test_stop_frees_the_sequence_at_once(server: Server, browser: Browser) -> None:
    await browser.settle(temperature="0", max_tokens="1500")
    await browser.ask("Tell me a long story about a ship, with many chapters.")
    await expect(browser.page.locator(".answer").first).not_to_be_empty(timeout=30_000)
    await until_running(server, 1)
    await browser.page.get_by_role("button", name="Stop").click()
    await until_running(server, 0)
    assert "stopped by you" in await browser.facts(0)
    assert browser.errors == []


async def test_a_dropped_stream_goes_on_without_a_repeat(server: Server, browser: Browser, relay: Relay) -> None:
    await browser.open(relay.url)
    question = "Tell me a story about a fox."
    expected = server.client.responses.create(model=MODEL, input=question, temperature=0, max_output_tokens=100)
    await browser.settle(temperature="0", max_tokens="100")
    await browser.ask(question)
    await expect(browser.page.locator(".answer").first).not_to_be_empty(timeout=30_000)
    async with browser.page.expect_request(re.compile("stream=true")) as resumed:
        relay.cut()
    assert int((await (await resumed.value).all_headers())["last-event-id"]) > 3
    await browser.facts(0)
    assert (await browser.answer(0)).split() == expected.output_text.split()


async def test_a_page_that_was_left_takes_its_answer_up_again(server: Server, browser: Browser) -> None:
    question = "Tell me a story about a crow."
    expected = server.client.responses.create(model=MODEL, input=question, temperature=0, max_output_tokens=100)
    await browser.settle(temperature="0", max_tokens="100")
    await browser.ask(question)
    await expect(browser.page.locator(".answer").first).not_to_be_empty(timeout=30_000)
    async with browser.page.expect_request(re.compile("stream=true")):
        await browser.page.reload()
    await browser.facts(0)
    assert (await browser.answer(0)).split() == expected.output_text.split()


async def test_markdown_of_an_answer_can_do_no_harm(browser: Browser) -> None:
    evil = (
        "**bold** <img src=x onerror=alert(1)> [x](javascript:alert(1)) <form><button>Send</button></form>"
        '<script>alert(1)</script> <label for="new">Sources</label> <dialog open>x</dialog>'
    )
    html = await browser.page.evaluate(
        """async (text) => {
          const { render } = await import(new URL("playground/markdown.js", document.baseURI));
          const element = document.createElement("div");
          render(element, text, false);
          return element.innerHTML;
        }""",
        evil,
    )
    assert "<strong>bold</strong>" in html
    assert not re.search(r"<img|javascript:|<form|<button|<script|onerror|<label|<dialog", html)


async def test_what_is_written_stays_selected_while_the_answer_grows(browser: Browser) -> None:
    selected = await browser.page.evaluate(
        """async () => {
          const { render } = await import(new URL("playground/markdown.js", document.baseURI));
          const element = document.createElement("div");
          document.body.append(element);
          render(element, "First.\\n\\nSecond", true);
          getSelection().selectAllChildren(element.firstChild);
          render(element, "First.\\n\\nSecond one.\\n\\nThird", true);
          return [getSelection().toString().trim(), element.textContent.replaceAll("\\n", "|")];
        }"""
    )
    assert selected == ["First.", "First.|Second one.|Third|"]


async def test_the_live_tab_shows_what_happens(server: Server, browser: Browser) -> None:
    await browser.page.get_by_role("tab", name="Live").click()
    await expect(browser.page.locator("#live-state")).to_contain_text("1 instance")
    await expect(browser.page.locator("#plots canvas")).to_have_count(10)
    running = browser.page.locator("figure", has_text="Sequences").locator(".u-value").nth(1)
    await expect(running).to_have_text("0.0", timeout=10_000)
    answer = asyncio.create_task(
        asyncio.to_thread(
            lambda: server.client.completions.create(
                model=MODEL, prompt="Hi", max_tokens=100, extra_body={"ignore_eos": True, "service_tier": "priority"}
            )
        )
    )
    await expect(running).to_have_text("1.0", timeout=10_000)
    await answer
    row = browser.page.locator("#tails tbody tr", has_text="critical").first
    await expect(row.locator("td").nth(1)).to_contain_text("s", timeout=10_000)
    await browser.shoot("live-1280")
    await browser.check_accessibility()
    await browser.page.set_viewport_size({"width": 390, "height": 800})
    await browser.shoot("live-390")
    assert await browser.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.errors == []


async def test_an_address_without_https_will_do(server: Server, browser: Browser) -> None:
    # There browsers have no crypto.randomUUID.
    await browser.page.add_init_script("delete Crypto.prototype.randomUUID")
    await browser.page.evaluate("sessionStorage.clear()")
    await browser.open(server.url)
    assert browser.errors == []
