"""The page of the Space in headless Chromium, against a stand-in for the Hub: what its reader sees and what it sends.

Screenshots are kept where `LOX_HF_SCREENSHOTS` names a folder.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from space_world import OWNER_TOKEN, SPACE, USER_TOKEN, publish, save_pair

from fake_hub import FakeHub

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytest.importorskip("gradio", reason="the page is tested where gradio is: pip install 'lox-hf[space]'")
playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested where playwright is")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

ROOT = SPACE.parents[1]
EVIL = "<img src=x onerror=\"document.title='run'\">${document.title='run'}{{1}}"
SIZES = {"desktop": (1200, 900), "phone": (390, 844)}


@dataclass
class Site:
    """The page as it is served, and what its process printed."""

    url: str
    hub: FakeHub
    log: Path
    temporary: Path


@dataclass
class Visit:
    """One visitor, and all that went over the wire."""

    page: Any
    sent: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def fill(self, name: str, text: str) -> None:
        self.page.locator(f"#{name} input, #{name} textarea").first.fill(text)

    def plan(self, aligned: str = "org/aligned", base: str = "org/base") -> None:
        self.fill("aligned", aligned)
        self.fill("base", base)
        self.page.click("#plan-button")

    def keep(self, name: str) -> None:
        self.page.wait_for_timeout(400)
        if folder := os.environ.get("LOX_HF_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"space-{name}.png", full_page=True)
        # What is wider is cut off and cannot be scrolled to: look at the column, not at the document.
        right = self.page.evaluate("document.querySelector('#plan-button').getBoundingClientRect().right")
        assert right <= self.page.viewport_size["width"], f"{name}: wider than the window"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    (root / "tmp").mkdir()
    with FakeHub(USER_TOKEN) as hub, socket.socket() as probe:
        for name, folder in save_pair(root).items():
            publish(hub, f"org/{name}", folder)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "LOX_"))}
        place = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": OWNER_TOKEN, "PYTHONPATH": str(ROOT)}
        place |= {
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(root / "gradio"),
            "TMPDIR": str(root / "tmp"),
        }
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, SPACE / "app.py"], env={**ours, **place}, cwd=root, stdout=log, stderr=log
            )
            try:
                deadline = time.monotonic() + 120
                while "Open http" not in (root / "log").read_text():
                    assert process.poll() is None and time.monotonic() < deadline, (root / "log").read_text()
                    time.sleep(0.2)
                yield Site(f"http://127.0.0.1:{port}", hub, root / "log", root / "tmp")
            finally:
                process.terminate()
                process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(request: pytest.FixtureRequest, browser: Any, site: Site) -> Iterator[Visit]:
    yield from enter(browser, site, getattr(request, "param", "desktop"))


def enter(browser: Any, site: Site, size: str) -> Iterator[Visit]:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(120_000)
    visit = Visit(page := context.new_page())

    def answered(response: Any) -> None:
        try:
            visit.received.append(response.body())
        except playwright.Error:  # a stream that goes on, or a page that is left
            visit.received.append(b"")

    def asked(request: Any) -> None:
        visit.sent.append(f"{request.url} {request.headers} {request.post_data}")
        if not request.url.startswith((site.url, "data:", "blob:")):
            visit.elsewhere.append(request.url)

    page.on("request", asked)
    page.on("response", answered)
    page.on("console", lambda message: visit.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: visit.problems.append(str(error)))
    page.goto(site.url)
    page.wait_for_selector("#plan-button")
    yield visit
    context.close()


@pytest.mark.parametrize("visit", SIZES, indirect=True)
def test_from_the_names_to_the_hub(visit: Visit, site: Site, request: pytest.FixtureRequest) -> None:
    page, size = visit.page, request.node.callspec.params["visit"]
    assert "does not make a model safe" in page.inner_text("#lead")
    visit.keep(f"{size}-1-empty")
    visit.plan()
    page.wait_for_selector("#plan dl")
    plan = page.inner_text("#plan")
    assert f"org/aligned at {site.hub.head('org/aligned')[:7]}" in plan and "To download" in plan
    page.click("#plan summary")
    assert "model.layers.0.mlp.down_proj.weight" in page.inner_text("#plan table")
    visit.keep(f"{size}-2-plan")
    page.click("#plan summary")
    page.click("#run-button")
    page.wait_for_selector("#report dl")
    assert "not evaluated" in page.inner_text("#report")
    page.click("#card button")
    page.wait_for_function("document.querySelector('#card .prose')?.innerText.includes('not evaluated')")
    assert page.locator("#card img").count() == 0
    visit.keep(f"{size}-3-report")
    page.click("#card button")
    page.fill("#push input[type=text], #push textarea", f"me/{size}-lox")
    visit.fill("token", USER_TOKEN)
    assert page.get_attribute("#token input", "type") == "password"
    page.click("#push-button")
    page.wait_for_selector("#pushed a")
    visit.keep(f"{size}-4-pushed")
    assert page.inner_text("#pushed a").endswith(site.hub.head(f"me/{size}-lox"))
    repo = site.hub.repos[f"me/{size}-lox"]
    assert repo.private and b"not evaluated" in repo.at("main")[1]["README.md"]
    check_the_token_is_gone(visit, site)
    assert visit.elsewhere == [] and visit.problems == []


def check_the_token_is_gone(visit: Visit, site: Site) -> None:
    """It went to the page's server once; it is in no field, store, answer, log or file."""
    page = visit.page
    assert page.input_value("#token input") == "" if page.locator("#token input").count() else True
    stores = """async () => { const found = [document.documentElement.outerHTML, JSON.stringify(localStorage),
        JSON.stringify(sessionStorage), document.cookie, location.href, JSON.stringify(history.state)];
        for (const {name} of await indexedDB.databases()) found.push(await new Promise(done => {
            const open = indexedDB.open(name); open.onsuccess = () => { const db = open.result, all = [];
            const names = [...db.objectStoreNames]; if (!names.length) return done(name);
            const read = db.transaction(names); read.oncomplete = () => done(JSON.stringify(all));
            names.forEach(n => { read.objectStore(n).getAll().onsuccess = e => all.push(e.target.result); }); }; }));
        return found.join("\\n"); }"""
    assert USER_TOKEN not in page.evaluate(stores)
    assert sum(USER_TOKEN in text for text in visit.sent) == 1
    assert not any(USER_TOKEN in text.partition(" ")[0] for text in visit.sent)
    assert not any(USER_TOKEN.encode() in data for data in visit.received)
    files = [path for path in site.log.parent.rglob("*") if path.is_file()]
    assert site.log in files and not [path for path in files if USER_TOKEN.encode() in path.read_bytes()]
    assert [path for path in site.temporary.glob("lox-space-*/*") if path.is_dir()] == []


def test_mistakes_are_explained_and_foreign_text_is_text(visit: Visit, site: Site) -> None:
    page = visit.page
    for name, match in {
        "": "Name the aligned model",
        "../../etc": "is not the id of a model on the Hub",
        str(site.temporary): "is not the id of a model on the Hub",
        "org/nothing": "'org/nothing' is no public model on the Hub",
        EVIL: f"'{EVIL}' is not the id",
    }.items():
        visit.plan(name)
        page.wait_for_function("text => document.querySelector('#plan')?.innerText.includes(text)", arg=match)
        assert page.locator("#plan [role=alert]").count() == 1 and "Traceback" not in page.inner_text("body")
        assert not page.is_visible("#run-button")
    visit.keep("error")
    assert page.locator("#plan img").count() == 0 and page.title() != "run"
    assert visit.problems == [] and visit.elsewhere == []


def test_a_changed_field_takes_the_plan_away(visit: Visit) -> None:
    page = visit.page
    visit.plan()
    page.wait_for_selector("#run-button")
    page.locator("#r input").first.fill("3")
    page.wait_for_selector("#run-button", state="hidden")


def test_two_visitors_do_not_see_each_other(browser: Any, visit: Visit, site: Site) -> None:
    other = next(visits := enter(browser, site, "phone"))
    for one in (visit, other):
        one.plan()
    for one in (visit, other):
        one.page.wait_for_selector("#run-button")
        one.page.click("#run-button")
    for one in (visit, other):
        one.page.wait_for_selector("#report dl")
    assert len(list(site.temporary.glob("lox-space-*/*/output/hardened"))) == 2
    visit.plan(base="org/nothing")  # one begins anew: its model goes, the other's stays
    visit.page.wait_for_selector("#plan [role=alert]")
    assert len(list(site.temporary.glob("lox-space-*/*/output/hardened"))) == 1
    assert other.page.is_visible("#push-button") and not visit.page.is_visible("#push-button")
    visits.close()


def test_there_is_nothing_for_programs_and_no_file_is_served(site: Site) -> None:
    def status(path: str, data: bytes | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(site.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    endpoints = json.loads(status("/gradio_api/info")[1])
    assert endpoints["named_endpoints"] == {} and endpoints["unnamed_endpoints"] == {}
    config = json.loads(status("/config")[1])
    assert config["run_history"] is False and config["analytics_enabled"] is False
    for path in (str(site.log), str(SPACE / "app.py"), "/etc/passwd", "../../../etc/passwd"):
        assert status(f"/gradio_api/file={path}")[0] in (403, 404)
    for name in ("_plan", "_harden", "_push", "predict"):
        code, answer = status(f"/gradio_api/call/{name}", b'{"data": []}')
        assert code >= 400 or b"event_id" not in answer, (name, answer)
