"""Jobs of a long run: each one's result is a file as soon as it is there, and what is there is not done again."""

import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lox_hf.errors import LoxError, OutputError
from lox_hf.evaluation.run_folder import RunFolder
from lox_hf.progress import progress_bar
from lox_hf.records import JsonRecord

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
        self._pool: ProcessPoolExecutor | None = None

    @contextmanager
    def started(self) -> Iterator["Runner[Result]"]:
        """Hold the processes for the time of a block; they end with it, and with this process however it ends."""
        if self.workers is None:
            yield self
            return
        # Not forked: threads of torch and of tokenizers do not survive that.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=begin_worker)
        try:
            yield self
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
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
        missing = [number for number, job in enumerate(jobs) if not self.is_done(job)]
        found = {number: self.kept(job) for number, job in enumerate(jobs) if number not in missing}
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
        return self.kept(job) is not None and (job.leaves is None or job.leaves.exists())

    def kept(self, job: Job[Any]) -> Any:
        """Return the result that an earlier process left; None where there is none.

        Raises:
            OutputError: If the file is damaged, or holds the result of a job with other settings.
        """
        text = self.folder.read(job.path)
        if not text:
            return None
        try:
            data = json.loads(text)
            settings, result = data["settings"], job.read(data["result"])
        except (ValueError, KeyError, TypeError) as error:
            path = f"{self.folder.folder}/{job.path}"
            raise OutputError(f"{path} is damaged: remove it, and the run makes it anew.") from error
        wanted = json.loads(json.dumps(job.settings()))
        if settings != wanted:
            names = [name for name in {**settings, **wanted} if settings.get(name) != wanted.get(name)]
            differing = "; ".join(f"{name}: {settings.get(name)!r} there, {wanted.get(name)!r} now" for name in names)
            raise OutputError(
                f"The output {self.folder.folder} holds {job.path} with other settings ({differing:.600}): choose "
                "another folder, or take back the change."
            )
        return result

    def _run(self, jobs: Sequence[tuple[int, Job[Any]]]) -> Iterator[tuple[int, Any]]:
        if self._pool is None:
            yield from ((number, job.run()) for number, job in jobs)
            return
        futures: dict[Future[Any], int] = {self._pool.submit(_run_job, job): number for number, job in jobs}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=futures.__getitem__):
                yield futures[future], _result(future)


def _result(future: "Future[Any]") -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise LoxError(
            "A worker process ended by itself, as where memory runs out: pass fewer workers. What is finished is "
            "kept, and the same call goes on."
        ) from error


def _run_job(job: Job[Any]) -> Any:
    return job.run()


def begin_worker() -> None:
    """Give a process of a pool one thread, and end it with its parent, however that ends: else it waits for ever."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
