"""An endpoint as a chat model, against a real server: every answer once, whatever goes wrong."""

import asyncio
import socket
import threading
import time
import traceback

import pytest

from evaluation.asking import KEY, always, answers, echo, first, only, prompts
from evaluation.endpoint_server import RETRY_AFTER_S, EndpointServer, completion, drawn
from lox_hf.errors import EndpointError
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.endpoint import Endpoint


def test_every_position_comes_once_with_its_own_answer_and_as_many_at_once_as_allowed():
    with EndpointServer(echo, latency_s=0.05) as server:
        found = answers(Endpoint("judge", base_url=server.base_url, concurrency=7), prompts(40))
    assert {position: reply.text for position, reply in found.items()} == {n: f"echo prompt {n}" for n in range(40)}
    assert len(server.requests) == 40
    assert server.peak == 7


def test_a_request_says_what_was_set():
    options = {"max_new_tokens": 5, "seed": 7, "extra_body": {"top_k": 1}, "response_format": {"type": "json_object"}}
    with EndpointServer(echo) as server:
        endpoint = Endpoint("org/model", base_url=server.base_url, **options)
        answers(endpoint, [ask("hello", system="be brief")])
    sent = {"temperature": 0, "seed": 7, "top_k": 1, "response_format": {"type": "json_object"}}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert server.requests[0].body == sent | {
        "model": "org/model",
        "messages": messages,
        "max_completion_tokens": 5,
    }
    assert endpoint.settings() == sent | {
        "base_url": server.base_url,
        "max_new_tokens": 5,
    }


def test_all_that_may_pass_is_tried_again_and_every_answer_arrives():
    rates = {"429": 0.1, "429 retry-after": 0.03, "500": 0.1, "hang": 0.03, "reset": 0.1, "garbage": 0.1}
    with EndpointServer(echo, faults=drawn(rates, seed=4)) as server:
        found = answers(Endpoint("judge", base_url=server.base_url, timeout_s=0.5), prompts(60))
    assert {position: reply.text for position, reply in found.items()} == {n: f"echo prompt {n}" for n in range(60)}
    assert {drawn(rates, seed=4)(n, {}) for n in range(len(server.requests))} == {None, *rates}


def test_retry_after_is_waited_for_and_an_hour_is_not():
    with EndpointServer(echo, faults=first(1, "429 retry-after")) as server:
        started = time.monotonic()
        assert only(server).text == "echo prompt 0"
        assert time.monotonic() - started > RETRY_AFTER_S
    with EndpointServer(echo, faults=always("429 retry-after"), retry_after_s=3600) as server:
        started = time.monotonic()
        assert only(server).transient
        assert time.monotonic() - started < 5
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "HTTP 500"),
        ("429", "HTTP 429"),
        ("hang", "no answer within 0.2 s"),
        ("drip", "no answer within 0.2 s"),
        ("reset", "disconnected"),
        ("garbage", "no chat completion"),
    ],
)
def test_one_request_that_keeps_failing_costs_no_other(fault, words):
    def faults(number, body):
        return fault if body["messages"][0]["content"] == "prompt 3" else None

    with EndpointServer(echo, faults=faults) as server:
        found = answers(Endpoint("judge", base_url=server.base_url, retries=1, timeout_s=0.2), prompts(6))
        assert len(server.requests) == 7
    assert words in found[3].error
    assert found[3].transient
    assert [found[n].text for n in (0, 1, 2, 4, 5)] == [f"echo prompt {n}" for n in (0, 1, 2, 4, 5)]


def test_a_request_that_always_breaks_is_no_server_that_is_not_there():
    with EndpointServer(echo, faults=always("reset")) as server:
        reply = only(server, retries=3)  # all that is left of a run, so that nothing else is heard of the server
    assert "disconnected" in reply.error
    assert reply.transient
    assert len(server.requests) == 4


def test_a_request_that_is_declined_is_sent_again_by_the_next_run_only():
    with EndpointServer(echo, faults=lambda number, body: "400" if number == 0 else None) as server:
        found = answers(Endpoint("judge", base_url=server.base_url, concurrency=1), prompts(3))
    assert "HTTP 400" in found[0].error
    assert found[0].transient
    assert len(server.requests) == 3


def test_a_server_that_declines_everything_in_the_same_words_cannot_be_used():
    with EndpointServer(echo, faults=always("400 model")) as server:
        with pytest.raises(EndpointError, match=r"HTTP 400, refused model .*model's name 'judge'"):
            answers(Endpoint("judge", base_url=server.base_url, concurrency=1), prompts(100))
        assert len(server.requests) == 8
    with EndpointServer(echo, faults=lambda number, body: "400 model" if number else None) as server:
        found = answers(Endpoint("judge", base_url=server.base_url, concurrency=1), prompts(20))
    assert [position for position, reply in found.items() if not reply.error] == [0]  # so it is not the model
    with EndpointServer(echo, faults=always("400 model")) as server:
        assert len(answers(Endpoint("judge", base_url=server.base_url), prompts(20), done=[0])) == 19


@pytest.mark.parametrize("fault", ["400 {}", "400 content_filter"])
def test_a_server_that_declines_each_for_itself_is_asked_for_all(fault):
    with EndpointServer(echo, faults=lambda number, body: fault.format(number)) as server:
        found = answers(Endpoint("judge", base_url=server.base_url), prompts(50))
    assert len(server.requests) == 50
    words = "HTTP 400" if fault == "400 {}" else r"holds its answer back (content_filter)"
    assert all(words in reply.error for reply in found.values())


def test_positions_that_are_done_are_not_asked():
    with EndpointServer(echo) as server:
        found = answers(Endpoint("judge", base_url=server.base_url), prompts(6), done=[0, 2, 5])
    assert sorted(found) == [1, 3, 4]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "environment variable SECRET"),
        ("402", "balance"),
        ("403", "environment variable SECRET"),
        ("404", "model's name 'judge'"),
        ("405", "end in /v1"),
    ],
)
def test_an_endpoint_that_cannot_be_used_says_so_and_what_was_answered_is_kept(monkeypatch, fault, words):
    monkeypatch.setenv("SECRET", KEY)
    with EndpointServer(echo, faults=lambda number, body: fault if number >= 3 else None) as server:
        endpoint = Endpoint("judge", base_url=server.base_url, api_key_env="SECRET", concurrency=1)
        found = {}
        with pytest.raises(EndpointError, match=words) as caught:
            found.update(item for item in endpoint.replies(prompts(9)) if found.setdefault(*item))
    assert sorted(found) == [0, 1, 2]
    assert len(server.requests) == 4
    message = str(caught.value)
    assert server.base_url in message
    assert f"HTTP {fault}" in message
    assert "\n" not in message
    assert "***" in message  # the server repeated the key
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_is_not_there_is_told_within_seconds():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        started = time.monotonic()
        with pytest.raises(EndpointError, match="Check that the server is running"):
            answers(Endpoint("judge", base_url=url), prompts(3))
    assert time.monotonic() - started < 5


def test_a_server_that_fails_for_all_is_given_up_after_one_round_of_retries():
    with EndpointServer(echo, faults=always("500")) as server:
        with pytest.raises(EndpointError, match="HTTP 500"):
            answers(Endpoint("judge", base_url=server.base_url, retries=1), prompts(500))
    assert len(server.requests) <= 32 * 4


def test_older_servers_are_asked_in_their_words():
    def faults(number, body):
        return next((f"400 {name}" for name in ("max_completion_tokens", "seed", "temperature") if name in body), None)

    with EndpointServer(echo, faults=faults) as server:
        endpoint = Endpoint("judge", base_url=server.base_url, concurrency=1)
        with pytest.warns(UserWarning, match="does not take `(seed|temperature)`"):
            found = answers(endpoint, prompts(5))
    assert [found[n].text for n in range(5)] == [f"echo prompt {n}" for n in range(5)]
    assert len(server.requests) == 8  # three refusals, once for all prompts
    assert set(server.requests[-1].body) == {"model", "messages", "max_tokens"}
    assert endpoint.settings()["seed"] == 42


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (completion({"role": "assistant", "content": None, "refusal": "I will not."}), "I will not."),
        (completion({"role": "assistant", "content": None}), ""),
        (completion({"role": "assistant", "content": "<think>so\nso</think>\n\nYes."}), "Yes."),
        (completion({"role": "assistant", "content": "half \ud800"}), "half ?"),
    ],
)
def test_answers_in_other_forms(answer, text):
    with EndpointServer(lambda body: answer) as server:
        reply = only(server)
    assert (reply.text, reply.error, reply.cut_off) == (text, "", False)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (completion({"content": "", "role": "assistant"}, finish_reason="content_filter"), "holds its answer"),
        ({"choices": []}, "holds its answer back"),
        (completion({"content": "<think>so", "role": "assistant"}, finish_reason="length"), "max_new_tokens"),
        (completion({"content": ["a part"], "role": "assistant"}), "no text"),
        ({"choices": [{"message": None}]}, "no chat completion"),
        ({"object": "list"}, "no chat completion"),
    ],
)
def test_answers_that_are_none(answer, error):
    with EndpointServer(lambda body: answer) as server:
        reply = only(server, retries=0)
    assert error in reply.error
    assert (reply.text, reply.transient) == ("", True)


def test_a_thinking_part_is_removed_and_still_there_for_who_asks():
    with EndpointServer(lambda body: "<think>so</think>Yes.") as server:
        reply = only(server)
    assert (reply.text, reply.raw) == ("Yes.", "<think>so</think>Yes.")


def test_an_answer_at_the_limit_is_marked():
    with EndpointServer(lambda body: completion({"content": "so far"}, finish_reason="length")) as server:
        reply = only(server)
    assert (reply.text, reply.cut_off) == ("so far", True)


def test_a_text_that_cannot_be_sent_costs_no_other():
    with EndpointServer(echo) as server:
        found = answers(Endpoint("judge", base_url=server.base_url), [ask("half \ud800"), ask("whole")])
    assert "UTF-8" in found[0].error
    assert found[1].text == "echo whole"


@pytest.mark.parametrize("end", ["close", "exception", "finish"])
def test_ending_cancels_what_is_in_flight_and_leaves_no_thread(end):
    before = threading.active_count()
    with EndpointServer(
        echo, faults=lambda number, body: None if number == 0 or end == "finish" else "hang"
    ) as server:
        stream = Endpoint("judge", base_url=server.base_url).replies(prompts(50))
        next(stream)
        started = time.monotonic()
        if end == "close":
            stream.close()
        elif end == "exception":
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        else:
            assert len(list(stream)) == 49
        assert time.monotonic() - started < 2
        assert threading.active_count() == before + 1  # the server's
        wait_until(lambda: server.open == 0)
        asked = len(server.requests)
        time.sleep(0.3)
        assert len(server.requests) == asked
    assert threading.active_count() == before


def test_it_works_where_an_event_loop_runs():
    async def notebook(server):
        return only(server).text

    with EndpointServer(echo) as server:
        assert asyncio.run(notebook(server)) == "echo prompt 0"


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
