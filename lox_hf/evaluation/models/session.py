"""One pass over an endpoint: requests at once, retries, and what its failures mean."""

import asyncio
import itertools
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lox_hf.errors import EndpointError
from lox_hf.evaluation.models.chat import Conversation, Reply
from lox_hf.evaluation.models.templates import after_thinking

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

    from lox_hf.evaluation.models.endpoint import Endpoint

# Short at first, so that a stray failure costs little; eight waits come to half a minute all the same.
_FIRST_WAIT_S, _WAIT_GROWTH, _LONGEST_WAIT_S = 0.1, 2.2, 60.0
_CONNECT_S = 10.0
# A server that was never reached is most likely not there: three attempts, and no minute of waiting.
_RETRIES_UNREACHED = 2
# So many requests in a row that used up their retries are the server's fault, not the requests'.
_MOST_FAILURES_IN_A_ROW = 32
# So many declined in the same words before one is answered: some servers say so that they do not know the model.
_MOST_DECLINES = 8
# What a server may refuse, and the name it goes by elsewhere; None leaves it out.
_SUBSTITUTES = {"max_completion_tokens": "max_tokens", "seed": None, "temperature": None, "response_format": None}
_WRONG_PATH = "the path of the URL: most servers want it to end in /v1."
# Statuses after which no request can succeed.
_REMEDIES = {
    401: "Check the key: it is {key}.",
    402: "Check the account's balance.",
    403: "Check what the key may be used for: it is {key}.",
    404: f"Check the model's name '{{model}}', and {_WRONG_PATH}",
    405: f"Check {_WRONG_PATH}",
}
_DECLINED_REMEDY = "Check the model's name '{model}', and what is sent to the server."
_OTHER_REMEDY = "Check that the server is running, its URL and its limits; a lower `concurrency` may help."
_MAY_PASS = (408, 409, 429)


class Session:
    """The requests of one pass, in an event loop, and how the server has behaved so far.

    Args:
        endpoint: Where to ask, and how.
        answered: Whether an earlier pass had answers.
    """

    def __init__(self, endpoint: "Endpoint", *, answered: bool) -> None:
        self.endpoint = endpoint
        self.key = endpoint.api_key()
        self.answered = answered
        self.reached = False
        self.failed_in_a_row = 0
        self.declines: Counter[str] = Counter()
        self.jitter = random.Random()

    async def answer(
        self, pending: Iterable[tuple[int, Conversation]], emit: Callable[[tuple[int, Reply]], None]
    ) -> None:
        """Answer every conversation, each reply emitted at once.

        Args:
            pending: Positions and conversations.
            emit: Called with the position and the reply.

        Raises:
            EndpointError: If no request can succeed.
        """
        waiting = iter(pending)

        async def work() -> None:
            for position, conversation in waiting:
                emit((position, await self._reply(client, conversation)))

        try:
            async with self._client() as client, asyncio.TaskGroup() as group:
                for _ in range(self.endpoint.concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _client(self) -> "AsyncOpenAI":
        import openai

        key = self.key or "none"
        return openai.AsyncOpenAI(
            base_url=self.endpoint.base_url,
            api_key=key,
            default_headers=_own_headers(key) if self.endpoint.is_named else None,
            # Its timeout for reading begins anew with every byte.
            timeout=openai.Timeout(None, connect=_CONNECT_S),
            max_retries=0,  # its own waits are too long at first, and as long for a server that is not there
        )

    async def _reply(self, client: "AsyncOpenAI", conversation: Conversation) -> Reply:
        options, retries = self.endpoint.options, itertools.count()
        while True:
            outcome = await self._request(client, conversation, options)
            if isinstance(outcome, Reply):
                self.endpoint.options, self.answered, self.failed_in_a_row = options, True, 0
                return outcome
            accepted = _without_refused(options, outcome)
            if accepted != options:
                options = accepted
                continue
            if outcome.status in _REMEDIES:
                raise self._unusable(outcome)
            if not outcome.may_pass:
                return self._declined(outcome)
            wait_s = self._wait_s(outcome, next(retries))
            if wait_s is None:
                return self._give_up(outcome)
            await asyncio.sleep(wait_s)

    async def _request(
        self, client: "AsyncOpenAI", conversation: Conversation, options: dict[str, Any]
    ) -> "Reply | _Failure":
        import openai

        body = {"model": self.endpoint.name, "messages": conversation, **options}
        try:
            async with asyncio.timeout(self.endpoint.timeout_s):
                # As plain JSON: the client's classes take a quarter of a call's CPU time, and check nothing.
                answer = await client.post("/chat/completions", cast_to=object, body=body)
        except TimeoutError:
            return _Failure(f"no answer within {self.endpoint.timeout_s:g} s", may_pass=True)
        except UnicodeEncodeError:
            return _Failure("the conversation holds signs that UTF-8 cannot write")
        except ValueError:
            answer = None  # announced as JSON, but it is none
        except openai.OpenAIError as error:
            return self._failure(error)
        self.reached = True
        return _read(answer)

    def _failure(self, error: "OpenAIError") -> "_Failure":
        """What the client's error says; the error itself is dropped, as it may repeat the key."""
        import openai

        if isinstance(error, openai.APIStatusError):
            self.reached = True
            if error.code == "content_filter":
                return _held_back(error.code)
            status = error.status_code
            said = error.body.get("message") if isinstance(error.body, dict) else None
            text = self._one_line(f"HTTP {status}, {said or error.response.text}")
            after_s = _seconds(error.response.headers.get("retry-after"))
            return _Failure(text, status, after_s, may_pass=status in _MAY_PASS or status >= 500)
        if isinstance(error, openai.APITimeoutError):
            return _Failure(f"no connection within {_CONNECT_S:g} s", may_pass=True, unreachable=True)
        # Of httpx or of its successor, by the version of the client.
        unreachable = type(error.__cause__).__name__ == "ConnectError"
        return _Failure(self._one_line(str(error.__cause__ or error)), may_pass=True, unreachable=unreachable)

    def _wait_s(self, failure: "_Failure", retry: int) -> float | None:
        """Seconds until the next attempt; None where there is to be none."""
        unreached = failure.unreachable and not self.reached
        retries = min(self.endpoint.retries, _RETRIES_UNREACHED) if unreached else self.endpoint.retries
        if retry >= retries or failure.retry_after_s > _LONGEST_WAIT_S:
            return None
        backoff_s = min(_FIRST_WAIT_S * _WAIT_GROWTH**retry, _LONGEST_WAIT_S)
        return failure.retry_after_s + backoff_s * self.jitter.uniform(0.5, 1)

    def _declined(self, failure: "_Failure") -> Reply:
        self.failed_in_a_row = 0
        self.declines[failure.text] += failure.status is not None
        if not self.answered and self.declines[failure.text] >= _MOST_DECLINES:
            raise self._unusable(failure)
        return Reply("", error=failure.text, transient=True)

    def _give_up(self, failure: "_Failure") -> Reply:
        self.failed_in_a_row += 1
        unreached = failure.unreachable and not self.reached
        if unreached or self.failed_in_a_row >= _MOST_FAILURES_IN_A_ROW:
            raise self._unusable(failure)
        return Reply("", error=failure.text, transient=True)

    def _unusable(self, failure: "_Failure") -> EndpointError:
        remedy = _REMEDIES.get(failure.status or 0, _OTHER_REMEDY if failure.may_pass else _DECLINED_REMEDY)
        variable = self.endpoint.api_key_env
        key = (
            f"the one in the environment variable {variable}" if variable else "none, name its variable as api_key_env"
        )
        remedy = remedy.format(model=self.endpoint.name, key=key)
        return EndpointError(f"Cannot use the endpoint {self.endpoint.base_url}: {failure.text.rstrip('.')}. {remedy}")

    def _one_line(self, text: str) -> str:
        """A server's words as a terminal can bear them, without the key that some of them repeat."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())[:300]


@dataclass(frozen=True)
class _Failure:
    """Why a request brought no reply.

    Attributes:
        text: In words.
        status: HTTP status; None where none came back.
        retry_after_s: How long the server wants to be left alone, in seconds.
        may_pass: Another attempt may succeed.
        unreachable: There was no connection.
    """

    text: str
    status: int | None = None
    retry_after_s: float = 0.0
    may_pass: bool = False
    unreachable: bool = False


def _own_headers(key: str) -> dict[str, Any]:
    """Headers by which the client sends nothing that it finds in the environment, where it looks by itself."""
    import openai

    custom = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
    names = ["OpenAI-Organization", "OpenAI-Project", *(line.partition(":")[0].strip() for line in custom)]
    return {name: openai.Omit() for name in names} | {"Authorization": f"Bearer {key}"}


def _read(answer: Any) -> Reply | _Failure:
    """The reply out of a completion; nothing in it is taken on trust."""
    try:
        choice = answer["choices"][0] if answer["choices"] else {"message": {}, "finish_reason": "no choice"}
        message, ended = choice["message"], choice.get("finish_reason")
        text = message.get("content") or message.get("refusal") or ""
    except (TypeError, LookupError, AttributeError):
        return _Failure("the answer is no chat completion", may_pass=True)
    if not isinstance(text, str):
        return _Failure("the answer is no text")
    raw = text.encode("utf-8", "replace").decode()
    text = (after_thinking(raw) or "").strip()
    if not text and ended in ("no choice", "content_filter"):
        return _held_back(ended)
    if not text and ended == "length":
        return _Failure("no answer within the limit of new tokens, in which thinking counts: raise max_new_tokens")
    return Reply(text, cut_off=ended == "length", raw=raw)


def _held_back(reason: str) -> _Failure:
    return _Failure(f"the endpoint holds its answer back ({reason})")


def _without_refused(options: dict[str, Any], failure: _Failure) -> dict[str, Any]:
    """The options without those that a refusal names, or under the name that older servers know."""
    if failure.status not in (400, 422):
        return options
    refused = {name for name in _SUBSTITUTES if name in options and re.search(rf"\b{name}\b", failure.text)}
    for name in sorted(refused - {"max_completion_tokens"}):
        warnings.warn(f"The endpoint does not take `{name}` and is asked without it.", stacklevel=2)
    renamed = {_SUBSTITUTES[name] if name in refused else name: value for name, value in options.items()}
    return {name: value for name, value in renamed.items() if name}


def _seconds(header: str | None) -> float:
    """Seconds of a Retry-After header; 0 where it gives none."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
