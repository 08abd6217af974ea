"""Every page in a real browser: nothing fails to load, nothing is wider than a phone."""

import http.server
import shutil
import threading
from functools import partial

import pytest

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(build):
    """``(address, paths of all pages)`` of the site, served."""
    folder, done = build
    assert done.returncode == 0, done.stderr
    handler = partial(Quiet, directory=str(folder))
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    paths = sorted(f"{file.parent.relative_to(folder)}/" for file in folder.rglob("index.html"))
    yield f"http://127.0.0.1:{served.server_address[1]}/", paths
    served.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if not CHROMIUM:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as p:
        one = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_every_page_renders(browser, site, size, scheme):
    address, paths = site
    assert len(paths) > 15
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    complaints = []
    page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status} {r.url}"))
    for path in paths:
        page.goto(address + path.removeprefix("./"), wait_until="networkidle")
        width = page.evaluate("document.scrollingElement.scrollWidth")
        assert width <= size["width"], f"{path} is {width} pixels wide"
        assert page.inner_text("h1").strip()
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
        assert page.evaluate(broken) == []
        wanted = {"light": "default", "dark": "slate"}[scheme]
        assert page.get_attribute("body", "data-md-color-scheme") == wanted
    assert complaints == []
    context.close()


def test_a_search_finds_a_word(browser, site):
    address, _ = site
    page = browser.new_page(viewport=DESK)
    page.goto(address, wait_until="networkidle")
    page.click("input[name=query]")
    page.keyboard.type("Walsh-Hadamard", delay=50)
    page.wait_for_selector(".md-search-result__item a", state="attached", timeout=60_000)
    links = page.eval_on_selector_all(".md-search-result__item a", "e => e.map(a => a.href)")
    assert any("/codec/" in link for link in links)
