"""Jobs of a long run: each one's result is a file as soon as it is there, and what is there is not done again."""

import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lox_hf.errors import OutputError
from lox_hf.progress import progress_bar
from lox_hf.records import JsonRecord
from lox_hf.run_folder import RunFolder, differences
from lox_hf.workers import Workers, hear_warnings, result_of

Result = TypeVar("Result", bound=JsonRecord)


class Job(Protocol[Result]):
    """One piece of work, as plain data that another process can be sent."""

    @property
    def path(self) -> str:
        """File of its result, relative to the run's folder."""
        ...

    @property
    def leaves(self) -> Path | None:
        """A folder that it makes besides its result, and without which it is to be done again."""
        ...

    def settings(self) -> dict[str, Any]:
        """What its result depends on, as JSON values."""
        ...

    def run(self) -> Result:
        """Do it."""
        ...

    def read(self, data: dict[str, Any]) -> Result:
        """Build the result from its dict."""
        ...


class Runner(Generic[Result]):
    """Runs jobs in this process or in several, and keeps every result.

    Args:
        folder: The open folder of the run.
        workers: Processes, each on one thread; None runs the jobs here, on torch's own number of threads. One and
            more give the same numbers to the bit.
        progressbar: Show progress bars; None shows them on a terminal only.
    """

    def __init__(self, folder: RunFolder, workers: int | None = None, progressbar: bool | None = None) -> None:
        self.folder, self.workers, self.progressbar = folder, workers, progressbar
        self._pool: Workers | None = None

    @contextmanager
    def started(self) -> Iterator["Runner[Result]"]:
        """Hold the processes for the time of a block; they end with it, and with this process however it ends."""
        if self.workers is None:
            yield self
            return
        with Workers(self.workers) as self._pool:
            yield self
        self._pool = None

    def results(self, jobs: Sequence[Job[Any]], description: str, unit: str) -> list[Any]:
        """Return the results of jobs in their order; those of an earlier process are read.

        Args:
            jobs: The jobs; none depends on another one.
            description: Text beside the progress bar.
            unit: What a job is, for the bar.

        Returns:
            The results.

        Raises:
            OutputError: If a file holds the result of a job with other settings, or the disk does not take one.
            LoxError: Whatever a job raises; what is finished is kept.
        """
        found = {number: result for number, job in enumerate(jobs) if (result := self._done(job)) is not None}
        missing = [number for number in range(len(jobs)) if number not in found]
        with progress_bar(len(jobs), self.progressbar, description, unit=unit, done=len(found)) as advance:
            for number, result in self._run([(number, jobs[number]) for number in missing]):
                kept = {"settings": jobs[number].settings(), "result": json.loads(result.to_json())}
                self.folder.write(jobs[number].path, json.dumps(kept, indent=1) + "\n")
                # As it will be read by a process that goes on: both must come to the same.
                found[number] = self.kept(jobs[number])
                advance(1)
        return [found[number] for number in range(len(jobs))]

    def is_done(self, job: Job[Any]) -> bool:
        """Say whether an earlier process did a job and what it made is still there."""
        return self._done(job) is not None

    def kept(self, job: Job[Any]) -> Any:
        """Return the result that an earlier process left; None where there is none.

        Raises:
            OutputError: If the file is damaged, or holds the result of a job with other settings.
        """
        try:
            text = self.folder.read(job.path)
            if not text:
                return None
            data = json.loads(text)
            settings, result = dict(data["settings"]), job.read(data["result"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever it may hold
            path = f"{self.folder.folder}/{job.path}"
            raise OutputError(f"{path} is damaged: remove it, and the run makes it anew.") from error
        wanted = json.loads(json.dumps(job.settings()))
        if settings != wanted:
            raise OutputError(
                f"The output {self.folder.folder} holds {job.path} with other settings "
                f"({differences(settings, wanted)}): choose another folder, or take back the change."
            )
        return result

    def _done(self, job: Job[Any]) -> Any:
        """The result of a job that is not to be done again, else None."""
        return self.kept(job) if job.leaves is None or job.leaves.exists() else None

    def _run(self, jobs: Sequence[tuple[int, Job[Any]]]) -> Iterator[tuple[int, Any]]:
        if self._pool is None:
            yield from ((number, job.run()) for number, job in jobs)
            return
        futures: dict[Future[Any], int] = {self._pool.submit(_run_job, job): number for number, job in jobs}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=futures.__getitem__):
                result, heard = result_of(future)
                for text in heard:
                    warnings.warn(text, stacklevel=2)
                yield futures[future], result


def _run_job(job: Job[Any]) -> tuple[Any, list[str]]:
    return hear_warnings(job.run)
