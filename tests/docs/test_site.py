"""The site builds without a warning, links lead somewhere, nothing is fetched from elsewhere."""

import re
from html.parser import HTMLParser
from urllib.parse import urldefrag, urlsplit

import pytest
from blocks import ROOT

import vllm_metal_tq
from vllm_metal_tq.integrations import mlx_lm


class Page(HTMLParser):
    """What a page links to, loads, and names."""

    def __init__(self, file):
        super().__init__()
        self.links, self.loads, self.names = [], [], set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.names.add(attrs["id"])
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag in ("script", "img", "iframe", "source") and attrs.get("src"):
            self.loads.append(attrs["src"])
        elif tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loads.append(attrs["href"])


@pytest.fixture(scope="module")
def pages(build):
    """File of the site -> its ``Page``."""
    return {file: Page(file) for file in build[0].rglob("*.html") if file.name != "404.html"}


def test_it_builds_strictly(build):
    _, done = build
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr


def test_every_link_inside_leads_somewhere(pages):
    broken = []
    for file, page in pages.items():
        for link in page.links:
            path, name = urldefrag(link)
            if urlsplit(link).scheme:
                continue
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            there = target in pages and (not name or name in pages[target].names)
            if not there and name != "__skip":
                broken.append((file.parent.name, link))
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(pages):
    for file, page in pages.items():
        assert [address for address in page.loads if urlsplit(address).netloc] == [], file


def test_formulas_are_mathml_and_leave_no_latex(pages):
    text = next(file for file in pages if file.parent.name == "codec").read_text(encoding="utf-8")
    formulas = re.findall(r"<math .*?</math>", text, re.DOTALL)
    assert len(formulas) == 12
    assert [formula for formula in formulas if "\\" in formula] == []


def test_the_api_page_has_all_that_is_public(pages):
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = {line.split(".")[-1] for line in text.splitlines() if line.startswith(":::")}
    described.discard("calibration")  # a module, whose members are listed
    assert {*vllm_metal_tq.__all__, *mlx_lm.__all__} <= described
    names = next(page.names for file, page in pages.items() if file.parent.name == "api")
    missing = [n for n in described if not any(name.split(".")[-1] == n for name in names)]
    assert missing == []


def test_the_readme_links_to_files_that_are_there():
    for name in ("README.md", "CONTRIBUTING.md", "metal/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert urlsplit(link).scheme or (ROOT / name).parent.joinpath(link).exists(), link
