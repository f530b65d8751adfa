"""An OpenAI-compatible endpoint on localhost, for tests in a thread and for benchmarks in a process of its own.

It answers POST /v1/chat/completions after a latency, and GET /v1/models at once, and fails where it is told to. One
event loop serves all connections, so that it keeps up with many clients on part of a core. As a program it takes
"latency_s", and "rates" and "seed" of faults, as JSON, prints its URL, scores by number until standard input ends, and
prints what it saw.
"""

import asyncio
import json
import random
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

# A fault is a status and perhaps what it is about: "500", "429 retry-after", "400 seed"; or it is "hang", "reset",
# "drip", which is an answer at 20 bytes a second, or "garbage", which is status 200 without JSON.
Faults = Callable[[int, Mapping[str, Any]], str | None]
Answer = Callable[[Mapping[str, Any]], str | dict[str, Any]]
RETRY_AFTER_S = 0.4


@dataclass(frozen=True)
class Request:
    """What came in; the body is empty for GET."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class EndpointServer:
    """The server; a context manager that serves while it is open.

    Attributes:
        requests: Every request for a completion, in the order they came in.
        peak: Most requests that were open at once.
        base_url: URL to give to a client.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        latency_s: float = 0.0,
        faults: Faults = lambda number, body: None,
        retry_after_s: float = RETRY_AFTER_S,
    ) -> None:
        self.answer, self.latency_s, self.faults, self.retry_after_s = answer, latency_s, faults, retry_after_s
        self.requests: list[Request] = []
        self.open = self.peak = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._connection, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop):
            self._loop.run_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                request = await _read(reader)
                if request.path == "/v1/models":
                    writer.write(_response(200, {"object": "list", "data": [{"id": "judge", "object": "model"}]}))
                elif request.path == "/v1/chat/completions" and request.method == "POST":
                    await self._complete(request, reader, writer)
                else:
                    writer.write(_response(404, _error("no such route")))
                await writer.drain()
        writer.close()

    async def _complete(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self.faults(len(self.requests), request.body)
        self.requests.append(request)
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            if fault == "hang":
                await reader.read()  # until the client goes away
            elif fault == "drip":
                for byte in _response(200, self._completion(request)):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.05)
            elif fault == "reset":
                writer.transport.abort()
            else:
                await asyncio.sleep(self.latency_s)
                writer.write(self._failure(fault, request) if fault else _response(200, self._completion(request)))
        finally:
            self.open -= 1

    def _completion(self, request: Request) -> dict[str, Any]:
        answer = self.answer(request.body)
        if isinstance(answer, dict):
            return answer
        return completion({"role": "assistant", "content": answer}, model=request.body["model"])

    def _failure(self, fault: str, request: Request) -> bytes:
        if fault == "garbage":
            return _response(200, "<html>not JSON")
        status, _, about = fault.partition(" ")
        # As indiscreet as a server can be: it repeats the key.
        message = f"refused {about} of {request.headers.get('authorization')}\nfor {request.body['model']}"
        header = f"Retry-After: {self.retry_after_s}\r\n" if about == "retry-after" else ""
        return _response(int(status), _error(message, code=about), header)


def completion(message: dict[str, Any], *, model: str = "judge", finish_reason: str = "stop") -> dict[str, Any]:
    """A completion with one choice, as the API gives it."""
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}


def drawn(rates: Mapping[str, float], seed: int = 0) -> Faults:
    """Faults at these rates; which request fails depends on its number and the seed only."""

    def fault(number: int, body: Mapping[str, Any]) -> str | None:
        kinds, weights = [None, *rates], [1 - sum(rates.values()), *rates.values()]
        return random.Random(f"{seed}/{number}").choices(kinds, weights)[0]

    return fault


def numbered_verdict(body: Mapping[str, Any]) -> str:
    """A judge's answer whose score follows from the number in "answer 17", or else from what was sent at all."""
    content = body["messages"][-1]["content"]
    numbers = re.findall(r"answer (\d+)", content)
    number = int(numbers[-1]) if numbers else sum(content.encode())
    return json.dumps({"reason": "by number", "score": 1 + number % 5})


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *fields = head.removesuffix("\r\n\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (item.partition(":") for item in fields)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, path, _ = line.split(" ")
    return Request(method, path, headers, json.loads(body) if body else {})


def _error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


def _response(status: int, content: dict[str, Any] | str, fields: str = "") -> bytes:
    data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n{fields}\r\n"
    return head.encode("latin-1") + data


def main() -> None:
    """Serve until standard input ends."""
    options = json.loads(sys.argv[1])
    faults = drawn(options["rates"], options["seed"])
    with EndpointServer(numbered_verdict, latency_s=options["latency_s"], faults=faults) as server:
        print(server.base_url, flush=True)
        sys.stdin.read()
    kinds = [faults(number, {}) for number in range(len(server.requests))]
    print(json.dumps({"requests": len(kinds), "peak": server.peak, "faults": len(kinds) - kinds.count(None)}))


if __name__ == "__main__":
    main()
