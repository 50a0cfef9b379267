"""Who may ask a server: keys, and without one no page of a browser."""

from __future__ import annotations

import httpx
import pytest
from typer.testing import CliRunner

from kt_sft.cli import app
from kt_sft.errors import ConfigError
from kt_sft.serving.access import Hosts, key_bytes
from kt_sft.serving.app import create_app
from kt_sft.serving.server import bind
from tests.helpers.fake_chat import HI, FakeChat, running

ROUTES = ("/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate")
BODY = {"model": "demo", "messages": HI, "prompt": "hi", "stream": False}


def error_of(response: httpx.Response) -> str:
    error = response.json()["error"]
    return error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "a b", ""])
@pytest.mark.parametrize("path", [*ROUTES, "/v1/models", "/api/tags", "/health", "/nothing", "/"])
def test_name_that_was_bound_to_this_address_is_refused(url, chat, host, path):
    """DNS rebinding: the page's own name, now of this address, so that to the browser it is the same origin."""
    num_prompts = len(chat.prompts)
    method = "POST" if path in ROUTES else "GET"
    response = httpx.request(method, url + path, json=BODY if method == "POST" else None, headers={"Host": host})
    assert response.status_code == 403 and "--allowed-host" in error_of(response)
    assert len(chat.prompts) == num_prompts


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "127.0.0.2", "[::1]:8000", "localhost."]
)
def test_names_of_this_machine_are_answered(url, host):
    assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost", "https://localhost:3000", "file://"]
)
@pytest.mark.parametrize("path", ROUTES)
def test_pages_of_other_servers_are_refused(url, chat, origin, path):
    num_prompts = len(chat.prompts)
    response = httpx.post(url + path, json=BODY, headers={"Origin": origin})
    assert response.status_code == 403 and "origin" in error_of(response)
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert len(chat.prompts) == num_prompts
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    response = httpx.options(url + path, headers=preflight)
    assert response.status_code == 403 and "access-control-allow-origin" not in response.headers


def test_origin_of_this_server_is_its_own(url):
    assert httpx.post(f"{url}/v1/completions", json=BODY, headers={"Origin": url}).status_code == 200


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]
)
@pytest.mark.parametrize("path", ROUTES)
def test_bodies_that_forms_can_send_are_refused(url, chat, kind, path):
    num_prompts = len(chat.prompts)
    headers = {"Content-Type": kind} if kind else {}
    response = httpx.post(url + path, content=httpx.Request("POST", url, json=BODY).content, headers=headers)
    assert response.status_code == 415 and "application/json" in error_of(response)
    assert len(chat.prompts) == num_prompts


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_is_json(url, kind):
    content = httpx.Request("POST", url, json=BODY).content
    assert httpx.post(f"{url}/api/chat", content=content, headers={"Content-Type": kind}).status_code == 200


def test_with_a_key_the_key_decides():
    """A page does not know it; proxies may call the server by any name."""
    with running(FakeChat(), api_key="sesame") as (url, _):
        headers = {"Host": "models.example", "Origin": "https://models.example", "Authorization": "Bearer sesame"}
        content = httpx.Request("POST", url, json=BODY).content
        assert httpx.post(f"{url}/api/chat", content=content, headers=headers).status_code == 200
        for path in ("/v1/models", "/nothing", "/", "/api/tags"):
            assert httpx.get(url + path, headers={"Authorization": "Bearer sesam"}).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    ("bound", "more", "allowed", "refused"),
    [
        (
            "127.0.0.1",
            ["gpu.example"],
            ["gpu.example:8000", "GPU.example"],
            ["192.168.0.7", "0.0.0.0", "x.gpu.example"],
        ),
        ("::1", [], ["[::1]", "127.0.0.1"], ["[2001:db8::1]"]),
        (
            "0.0.0.0",
            [],
            ["192.168.0.7:80", "[2001:db8::1]"],
            ["evil.example", "[::", "1.2.3", "192.168.0.7.evil.example"],
        ),
    ],
)
def test_names_of_a_server_follow_its_address(bound, more, allowed, refused):
    hosts = Hosts.of(bound, more)
    assert [host for host in allowed if not hosts.allow(host)] == []
    assert [host for host in refused if hosts.allow(host)] == []


@pytest.mark.parametrize("key", ["", " ", "\t\n", "a b", "key\n", " key", "a\x00b", "a\u2028b", "\udcff"])
def test_keys_that_are_none_are_refused(key, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="expected a key of visible characters"):
        key_bytes(key, "--api-key")
    with pytest.raises(ConfigError):
        create_app(object(), api_key=key)
    if "\x00" in key or "\udcff" in key:
        return
    file = tmp_path / "never read.yaml"
    found = CliRunner().invoke(app, ["serve", str(file), "--port", "0", "--api-key", key])
    assert found.exit_code == 2 and "--api-key: expected a key" in found.output
    monkeypatch.setenv("KT_SFT_API_KEY", key)
    found = CliRunner().invoke(app, ["serve", str(file), "--port", "0"])
    assert found.exit_code == 2 and "KT_SFT_API_KEY: expected a key" in found.output


@pytest.mark.parametrize("name", ["http://gpu", "gpu:8000", "", "a/b", "*"])
def test_allowed_names_are_names(name, tmp_path):
    found = CliRunner().invoke(app, ["serve", str(tmp_path / "x.yaml"), "--port", "0", "--allowed-host", name])
    assert found.exit_code == 2 and "--allowed-host: expected a name" in found.output


def test_empty_address_is_not_every_address():
    with pytest.raises(ConfigError, match=r"--host: expected an address.*0\.0\.0\.0"):
        bind("", 0)
