"""Pages of the web may not ask a server of this machine, unless it is told that they may."""

import json

import pytest
from serving import post, server

from vllm_metal_tq.integrations.mlx_lm.server.origins import may_ask

LOCAL = (
    "http://localhost",
    "http://localhost:3000",
    "https://app.localhost:8443",
    "http://127.0.0.1:8080",
    "http://[::1]:8080",
    "app://obsidian.md",
    "vscode-webview://1a2b",
)
FOREIGN = (
    "null",
    "",
    "https://example.com",
    "http://localhost.example.com",
    "http://example.com:8080",
    "http://127.0.0.1.example.com",
    "http://192.168.1.5",
    "http://[::1",
    "http://notlocalhost",
)
ASKED = {"prompt": "abc", "max_tokens": 2}


@pytest.mark.parametrize("origin", LOCAL)
def test_pages_of_this_machine_and_applications_may_ask(origin):
    assert may_ask(origin, ["local"])
    assert not may_ask(origin, ["none"])


@pytest.mark.parametrize("origin", FOREIGN)
def test_other_pages_may_not_unless_they_are_named_or_all_are(origin):
    assert not may_ask(origin, ["local"])
    assert may_ask(origin, ["local", origin])
    assert may_ask(origin, ["*"])


@pytest.fixture(scope="module")
def served():
    with server() as running:
        yield running


def test_a_page_that_may_not_ask_is_not_served(served):
    """Even as text/plain, for which a browser asks nobody first."""
    for origin in ("https://example.com", "null"):
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        before = served.generator.stats.requests
        status, text, answered = post(served, ASKED, headers=headers)
        assert (status, json.loads(text)["error"]["code"]) == (403, "origin_not_allowed")
        assert "--allowed-origins" in text
        assert "Access-Control-Allow-Origin" not in answered
        assert served.generator.stats.requests == before


def test_a_page_that_may_reads_its_answer(served):
    origin = "http://localhost:3000"
    status, _, answered = post(served, ASKED, headers={"Origin": origin})
    assert (status, answered["Access-Control-Allow-Origin"]) == (200, origin)
    assert answered["Vary"] == "Origin"


def test_who_is_no_browser_names_no_origin(served):
    assert post(served, ASKED)[0] == 200


def test_all_may_ask_if_the_server_is_told_so():
    with server("--allowed-origins", "*") as running:
        status, _, answered = post(running, ASKED, headers={"Origin": "https://example.com"})
    assert (status, answered["Access-Control-Allow-Origin"]) == (200, "https://example.com")
