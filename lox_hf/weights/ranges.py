"""One file of a Hub repository, read by ranges with the client's own session; a cut connection is taken up again."""

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lox_hf.errors import CheckpointError
from lox_hf.hub_files import hub_errors
from lox_hf.weights.output_file import output_errors

TRIES = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 16.0


class _Cut(Exception):
    """The connection broke before the answer was complete."""


class RemoteFile:
    """One file of a repository at a commit.

    Args:
        repo_id: Hub id.
        name: Name of the file.
        commit: The commit, whole.
        token: Hub token; None uses the stored login.

    Attributes:
        size_bytes: Size of the file; known once something was read.
        etag: What the Hub calls the content, for a large file its SHA-256; known once something was read.
    """

    def __init__(self, repo_id: str, name: str, commit: str, token: str | bool | None) -> None:
        import huggingface_hub
        from huggingface_hub.utils import build_hf_headers

        self.repo_id, self.name, self.commit = repo_id, name, commit
        self.label = f"{name} of '{repo_id}' at {commit}"
        self.size_bytes, self.etag = -1, ""
        self._url = huggingface_hub.hf_hub_url(repo_id, name, revision=commit)
        self._headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield a part of the file, from the byte reached on where a connection is cut.

        Args:
            start: First byte.
            stop: Byte after the last; more than the file has means its end.

        Yields:
            Pieces as they arrive.

        Raises:
            CheckpointError: If the Hub refuses or cannot be reached, or the file is not the one that was begun.
        """
        position, failures, wait_s = start, 0, FIRST_WAIT_S
        with hub_errors(self.repo_id, self.commit, self.name):
            while position < stop:
                try:
                    for piece in self._request(position, stop):
                        position += len(piece)
                        failures, wait_s = 0, FIRST_WAIT_S
                        yield piece
                    stop = min(stop, self.size_bytes)
                except _Cut as cut:
                    failures += 1
                    if failures == TRIES:
                        raise CheckpointError(
                            f"Cannot read {self.label}: the connection broke at byte {position}, and {TRIES} tries "
                            f"brought nothing more: {cut}. Run the command again."
                        ) from cut
                    time.sleep(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def save(self, path: Path) -> None:
        """Write the whole file to disk.

        Args:
            path: Where to write.

        Raises:
            CheckpointError: If it cannot be read, or has not the content that the Hub says it has.
            OutputError: If the disk does not take it.
        """
        digest = hashlib.sha256()
        with output_errors(path), path.open("wb") as file:
            for piece in self.pieces(0, self.size_bytes):
                digest.update(piece)
                file.write(piece)
        if re.fullmatch("[0-9a-f]{64}", self.etag) and digest.hexdigest() != self.etag:
            raise CheckpointError(f"{self.label} arrived with another content than the Hub says it has: try again.")

    def _request(self, start: int, stop: int) -> Iterator[bytes]:
        """One request; the client's session, headers and waits where the Hub is busy."""
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        try:
            with http_stream_backoff(
                "GET",
                self._url,
                headers={**self._headers, "Range": f"bytes={start}-{stop - 1}"},
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                retry_on_exceptions=(),  # the bytes that have arrived would come again
            ) as response:
                hf_raise_for_status(response)
                self._check(response, start)
                yield from response.iter_bytes()  # in chunks of one size the last bytes before a cut would be lost
        except errors.HTTPError as error:
            if isinstance(error, errors.HfHubHTTPError):  # an answer: the client has tried again where that can help
                raise
            raise _Cut(" ".join(str(error).split()).rstrip(".")) from error

    def _check(self, response: Any, start: int) -> None:
        """Make sure that this is the part that was asked for, of the file that was begun."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status_code != 206 or found is None or int(found[1]) != start:
            raise CheckpointError(f"Cannot read {self.label}: the Hub did not answer with the bytes asked for.")
        first = (response.history or [response])[0].headers
        etag = (first.get("X-Linked-Etag") or first.get("ETag") or "").removeprefix("W/").strip('"')
        size_bytes = int(found[2])
        if self.size_bytes < 0:
            self.size_bytes, self.etag = size_bytes, etag
        if (size_bytes, etag) != (self.size_bytes, self.etag):
            raise CheckpointError(
                f"{self.label} changed while it was read: {self.size_bytes} bytes before, {size_bytes} now. Try again."
            )
