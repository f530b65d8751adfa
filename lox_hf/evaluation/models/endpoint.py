"""Any OpenAI-compatible endpoint as a chat model."""

import asyncio
import importlib.util
import os
import queue
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from lox_hf.errors import ConfigError, LoxError
from lox_hf.evaluation.models.chat import Conversation, Reply
from lox_hf.evaluation.models.session import Session

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY_ENV = "OPENAI_API_KEY"
# A key that was passed in place of its variable's name has other signs, and is not quoted.
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Endpoint:
    """A model behind an OpenAI-compatible API: OpenAI, vLLM, `transformers serve`, llama.cpp and others.

    Requests are sent at temperature 0, `concurrency` at a time. Timeouts, lost connections, 408, 409, 429 and 5xx are
    tried again after exponentially growing waits with jitter, and not before the server's Retry-After. A server that
    refuses `max_completion_tokens` is asked with `max_tokens`; one that refuses `temperature`, `seed` or
    `response_format` is asked without, with a warning.

    The key is read from the environment when it is sent, and is kept nowhere. OPENAI_ORG_ID, OPENAI_PROJECT_ID and
    OPENAI_CUSTOM_HEADERS count where no `base_url` is passed, and go to no other server.

    Args:
        model: The model's name at the endpoint.
        base_url: URL of the API, such as "http://localhost:8000/v1"; None takes OPENAI_BASE_URL, or else OpenAI.
        api_key_env: Environment variable that holds the key. None takes OPENAI_API_KEY where no `base_url` is passed,
            and sends no key to a server at one.
        max_new_tokens: Longest answer, in tokens.
        concurrency: Requests in flight at once.
        timeout_s: Longest time that a request may take until its answer is there, in seconds.
        retries: How often a request is tried again.
        seed: Seed for servers that draw even at temperature 0; None sends none.
        response_format: Form of the answers as the API describes it, such as a JSON schema; None leaves it free.
        extra_body: More fields of every request. They are written into reports: no secrets here.

    Attributes:
        name: The model's name.
        options: What is sent besides the conversation; what the server refuses is taken out.

    Raises:
        ConfigError: If a setting is out of range, the URL is none or holds a password, or there is no key.
        LoxError: If the `openai` package is not installed.

    Example:
        >>> from lox_hf.evaluation.models.chat import ask
        >>> from lox_hf.evaluation.models.endpoint import Endpoint
        >>> chat = Endpoint("Qwen/Qwen3-8B", base_url="http://localhost:8000/v1")
        >>> [reply.text for _, reply in chat.replies([ask("Say hello.")])]  # doctest: +SKIP
        ['Hello!']
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str | None = None,
        max_new_tokens: int = 60,
        concurrency: int = 32,
        timeout_s: float = 60.0,
        retries: int = 8,
        seed: int | None = 42,
        response_format: dict[str, Any] | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        self.name = model
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        self.is_named = base_url is not None and self.base_url != OPENAI_URL
        self.api_key_env = api_key_env or (None if self.is_named else OPENAI_KEY_ENV)
        self._needs_key = api_key_env is not None or self.base_url == OPENAI_URL
        self.concurrency, self.timeout_s, self.retries = concurrency, timeout_s, retries
        wanted = {"temperature": 0, "seed": seed, "response_format": response_format, **(extra_body or {})}
        given = {name: value for name, value in wanted.items() if value is not None}
        self.options: dict[str, Any] = {"max_completion_tokens": max_new_tokens, **given}
        own = {"base_url": self.base_url, "max_new_tokens": max_new_tokens}
        self._settings = own | given
        self._check(max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """What an answer depends on besides the model and the conversation; never the key."""
        return dict(self._settings)

    def replies(
        self, conversations: Sequence[Conversation], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Reply]]:
        """Answer conversations, `concurrency` at once; ending the iteration early cancels what is in flight.

        Args:
            conversations: The conversations; each ends with a user's turn.
            done: Positions that are answered already; they are not asked again.

        Yields:
            Position and reply, each as soon as it is known and in any order; every position that is not done once. A
            request that keeps failing, or that the server declines, gives a transient reply with `error`.

        Raises:
            EndpointError: If the server cannot be reached, refuses the key, does not know the model, declines the
                first requests in the same words (unless some are done), or lets many in a row fail. What was answered
                before has been yielded.
        """
        skip = set(done)
        pending = [item for item in enumerate(conversations) if item[0] not in skip]
        session = Session(self, answered=bool(skip))
        items: queue.SimpleQueue[tuple[int, Reply] | None] = queue.SimpleQueue()
        with _event_loop() as loop:
            answering = asyncio.run_coroutine_threadsafe(session.answer(pending, items.put), loop)
            answering.add_done_callback(lambda _: items.put(None))
            while (item := items.get()) is not None:
                yield item
            answering.result()

    def api_key(self) -> str:
        """Return the key out of the environment; empty for a server that is asked without one.

        Raises:
            ConfigError: If there is none where one is needed, or it cannot be one.
        """
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if not key and self._needs_key:
            raise ConfigError(
                f"There is no API key: set the environment variable {self.api_key_env}, or pass the base_url of a "
                "server that needs none."
            )
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"The environment variable {self.api_key_env} holds signs that no API key has: set it anew."
            )
        return key

    def _check(self, max_new_tokens: int) -> None:
        if importlib.util.find_spec("openai") is None:
            raise LoxError('An endpoint needs the client of OpenAI: pip install "lox-hf[eval]".')
        conditions = {
            f"max_new_tokens is {max_new_tokens}, at least 1 is needed": max_new_tokens >= 1,
            f"concurrency is {self.concurrency}, at least 1 is needed": self.concurrency >= 1,
            f"retries is {self.retries}, at least 0 is needed": self.retries >= 0,
            f"timeout_s is {self.timeout_s}, more than 0 is needed": self.timeout_s > 0,
            "api_key_env is not the name of an environment variable": ENV_NAME.fullmatch(self.api_key_env or "_"),
            "base_url is not like http://host:port/v1, without user, password and query": _is_plain(self.base_url),
        }
        wrong = [message for message, met in conditions.items() if not met]
        if wrong:
            raise ConfigError(f"Cannot ask '{self.name}' through an endpoint: {'; '.join(wrong)}.")
        self.api_key()


def _is_plain(url: str) -> bool:
    """Whether a URL names a server and nothing that is secret: it stands in reports and messages."""
    try:
        parts = urlsplit(url)
        port_is_number = parts.port is None or parts.port >= 0
    except ValueError:
        return False
    named = parts.scheme in ("http", "https") and bool(parts.hostname) and port_is_number
    return named and parts.username is None and parts.password is None and not parts.query


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, as a notebook's thread runs one already; leaving it cancels its tasks."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop):
            loop.run_forever()

    thread = threading.Thread(target=run, name="lox-hf-endpoint", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
