"""One job at a time, each in a process and a folder of its own that are gone when it is over."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lox_hf.errors import ConfigError, LoxError
from lox_hf.records import HardeningPlan, HardeningReport
from lox_space.form import Order, read_repo_id
from lox_space.settings import Settings

HERE = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.4
OUTPUT = "output"
LOGGER = logging.getLogger("lox_space")
# A token in the environment is the owner's, and is not for visitors; nor is where the owner's files are cached.
PRIVATE = re.compile(r"HF_(?!ENDPOINT$|HUB_DISABLE_XET$)|HUGGING|.*(TOKEN|SECRET|PASSWORD|API_KEY)", re.IGNORECASE)


class JobError(LoxError):
    """A job cannot be done now; the message says why."""


@dataclass(frozen=True)
class Planned:
    """A plan, and what has to be downloaded for it.

    Attributes:
        order: What was asked for.
        plan: What would be done to every tensor.
        aligned: Name, commit and bytes of the aligned model.
        base: Name, commit and bytes of the base.
        warnings: What the user should know.
    """

    order: Order
    plan: HardeningPlan
    aligned: dict[str, Any]
    base: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def download_bytes(self) -> int:
        """Bytes that are downloaded."""
        return self.aligned["download_bytes"] + self.base["download_bytes"]


@dataclass(frozen=True)
class Hardened:
    """A hardened model that waits in its folder.

    Attributes:
        folder: Folder of the job.
        report: What was done.
        card: Text of its model card, in Markdown.
        warnings: What the user should know.
    """

    folder: Path
    report: HardeningReport
    card: str = ""
    warnings: tuple[str, ...] = ()


@dataclass
class Workshop:
    """Plans, hardens and pushes.

    Attributes:
        settings: Limits.
        folder: Where jobs have their folders.
    """

    settings: Settings
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lox-space-")))
    _one: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, order: Order) -> Planned:
        """Plan without downloading weights.

        Args:
            order: What is asked for.

        Returns:
            The plan.

        Raises:
            LoxError: If the models cannot be found, are too large, or do not fit.
        """
        with self._job_folder() as folder:
            told = {"task": "plan", "order": asdict(order), "max_bytes": self.settings.max_bytes}
            answer = _last(self._run(told, folder))
        found = answer["result"]
        found["plan"]["aligned"] = _reference(found["aligned"])
        found["plan"]["base"] = _reference(found["base"])
        plan = HardeningPlan.from_dict(found["plan"])
        return Planned(order, plan, found["aligned"], found["base"], tuple(answer["warnings"]))

    def harden(self, planned: Planned) -> Iterator[float | Hardened]:
        """Download and harden.

        Args:
            planned: What was planned.

        Yields:
            The share that is done, again and again, and at last the hardened model, which stays until `drop`.

        Raises:
            LoxError: If it cannot be done.
        """
        expected = planned.download_bytes + planned.plan.total_bytes
        with self._alone():
            self._check_disk(expected)
            with self._job_folder() as folder:
                told = {"task": "harden", "order": asdict(planned.order)}
                told |= {role: _reference(getattr(planned, role), "name") for role in ("aligned", "base")}
                for item in self._run(told, folder):
                    if item is None:
                        yield min(1.0, _disk_bytes(folder) / max(1, expected))
                    else:
                        answer = item
                kept = Path(tempfile.mkdtemp(dir=self.folder))
                (folder / OUTPUT).rename(kept / OUTPUT)
        result = answer["result"]
        report = HardeningReport.from_dict(result["report"])
        yield Hardened(kept, report, result["card"], tuple(answer["warnings"]))

    def push(self, hardened: Hardened, repo_id: str, token: str, *, public: bool) -> str:
        """Upload a hardened model with its user's token.

        Args:
            hardened: The model.
            repo_id: Repository, made if needed.
            token: The token; it goes to the process that uploads and to nothing else.
            public: Whether a new repository is public.

        Returns:
            URL of the commit.

        Raises:
            LoxError: If it cannot be done.
        """
        name, token = read_repo_id(repo_id), (token or "").strip()
        if not re.fullmatch(r"[!-~]{1,500}", token):
            raise ConfigError("Paste a token that may write to your repositories: huggingface.co/settings/tokens.")
        if not hardened.folder.is_dir():
            raise JobError("The hardened model is not kept any more: harden it again.")
        with self._alone():
            told = {"task": "push", "repo_id": name, "token": token, "private": not public}
            return str(_last(self._run(told, hardened.folder))["result"]["url"])

    def drop(self, hardened: Hardened | None) -> None:
        """Remove a hardened model."""
        if hardened is not None:
            shutil.rmtree(hardened.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._one.acquire(blocking=False):
            raise JobError(
                "Somebody else's model is being hardened; one is done at a time. Try again in some minutes."
            )
        try:
            yield
        finally:
            self._one.release()

    @contextmanager
    def _job_folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _check_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise JobError(
                f"This needs {needed / 1e9:.3g} GB of disk for a while, and the machine of this page has "
                f"{free / 1e9:.3g} GB free. Try again later, or harden on your own machine with lox-hf harden."
            )

    def _run(self, told: dict[str, Any], folder: Path) -> Iterator[dict[str, Any] | None]:
        """Run a worker; yield None while it works and then its answer. It ends with whoever stops listening."""
        (folder / OUTPUT).mkdir(exist_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-m", "lox_space.worker"],
            cwd=folder / OUTPUT,
            env=_environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        with ThreadPoolExecutor(1) as pool:
            try:
                talk = pool.submit(child.communicate, json.dumps(told).encode(), self.settings.job_seconds)
                while not talk.done():
                    yield None
                    threading.Event().wait(POLL_SECONDS)
                printed, log = talk.result()
            except subprocess.TimeoutExpired:
                raise JobError(f"It took longer than {self.settings.job_seconds / 60:.0f} minutes.") from None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
        yield _answer(child.returncode, printed, log, told.get("token"))


def _answer(code: int, printed: bytes, log: bytes, token: str | None) -> dict[str, Any]:
    """What the worker answered; what it said besides goes to the owner's log, without the token."""
    answer = json.loads(printed) if code == 0 else {}
    if not answer:
        text = log.decode(errors="replace")
        LOGGER.error("A job failed with code %s:\n%s", code, text.replace(token, "***") if token else text)
        raise JobError("It failed for a reason that this page does not know; the owner finds it in the log.")
    if "error" in answer:
        raise JobError(answer["error"].replace(token, "***") if token else answer["error"])
    return answer


def _last(answers: Iterator[dict[str, Any] | None]) -> dict[str, Any]:
    *_, answer = answers
    assert answer is not None
    return answer


def _environment(folder: Path) -> dict[str, str]:
    """Environment of a worker: nobody's login, and the Hub's cache in the job's folder."""
    kept = {name: value for name, value in os.environ.items() if not PRIVATE.match(name)}
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    ours = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **ours, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "PYTHONPATH": path}


def _reference(found: dict[str, Any], name: str = "name_or_path") -> dict[str, Any]:
    return {name: found["name"], "revision": found["revision"]}


def _disk_bytes(folder: Path) -> int:
    """Bytes that a folder takes on the disk now."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:  # renamed or removed meanwhile
            continue
        total += status.st_blocks * 512 if path.is_file() and not path.is_symlink() else 0
    return total
