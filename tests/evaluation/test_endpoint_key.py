"""What an endpoint's settings may be, and where a key goes: into one header, and nowhere else."""

import json
import logging
import traceback
import warnings

import pytest

from evaluation.asking import KEY, always, echo, only, prompts
from evaluation.endpoint_server import EndpointServer
from lox_hf.errors import ConfigError, LoxError
from lox_hf.evaluation.models.endpoint import Endpoint


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("API_KEY", "BASE_URL", "ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)


def test_without_a_key_openai_is_refused_and_a_local_server_is_asked():
    with pytest.raises(ConfigError, match="environment variable OTHER_KEY"):
        Endpoint("gpt-4o-mini", api_key_env="OTHER_KEY")
    with EndpointServer(echo) as server:
        assert only(server).text == "echo prompt 0"
    assert server.requests[0].headers["authorization"] == "Bearer none"


def test_the_key_for_openai_goes_to_no_other_server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    others = {"openai-organization": "org-hidden", "openai-project": "project-hidden", "x-gateway": "gate-hidden"}
    monkeypatch.setenv("OPENAI_ORG_ID", others["openai-organization"])
    monkeypatch.setenv("OPENAI_PROJECT_ID", others["openai-project"])
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: gate-hidden")
    with EndpointServer(echo) as server:
        only(server)
        assert KEY not in str(server.requests[0].headers)
        assert "hidden" not in str(server.requests[0].headers)
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)  # control: there it is meant
        assert [reply.text for _, reply in Endpoint("judge").replies(prompts(1))] == ["echo prompt 0"]
        assert server.requests[1].headers.items() >= (others | {"authorization": f"Bearer {KEY}"}).items()
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "authorization: hidden\nno header")
        assert only(server).text == "echo prompt 0"
        assert server.requests[2].headers["authorization"] == "Bearer none"
    with pytest.raises(ConfigError, match="environment variable OTHER_KEY"):
        Endpoint("judge", base_url="http://localhost:1/v1", api_key_env="OTHER_KEY")


@pytest.mark.parametrize("fault", [None, "400", "401", "429", "500", "hang", "reset"])
def test_the_key_is_in_the_authorization_header_and_nowhere_else(monkeypatch, capfd, caplog, fault):
    monkeypatch.setenv("OTHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    seen = []
    with warnings.catch_warnings(record=True) as warned, EndpointServer(echo, faults=always(fault)) as server:
        warnings.simplefilter("always")
        endpoint = Endpoint("judge", base_url=server.base_url, api_key_env="OTHER_KEY", retries=1, timeout_s=0.3)
        try:
            seen += [reply for _, reply in endpoint.replies(prompts(1))]
        except LoxError as error:
            seen += traceback.format_exception(error)
    seen += [endpoint, vars(endpoint), endpoint.settings(), *capfd.readouterr(), caplog.text, *map(str, warned)]
    assert KEY not in "\n".join(map(str, seen))
    request = server.requests[0]
    assert request.headers.pop("authorization") == f"Bearer {KEY}"
    assert KEY not in json.dumps([request.path, request.headers, request.body])
    assert ("***" in str(seen)) == (fault in ("400", "401", "429", "500"))  # which repeat the key


def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-harmless\nexample")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        Endpoint("gpt-4o-mini")
    assert "harmless" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as a file gives it
    assert Endpoint("gpt-4o-mini").api_key() == KEY


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concurrency": 0}, "concurrency is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"base_url": "localhost:8000"}, "base_url is not like"),
        ({"base_url": "http://user:hidden@localhost/v1"}, "base_url is not like"),
        ({"base_url": "http://localhost/v1?key=hidden"}, "base_url is not like"),
        ({"base_url": "http://localhost:port/v1"}, "base_url is not like"),
        ({"concurrency": 0, "retries": -1}, "concurrency is 0.*retries is -1"),
    ],
)
def test_settings_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Endpoint("judge", **{"base_url": "http://localhost/v1"} | options)
    assert "hidden" not in str(caught.value)
