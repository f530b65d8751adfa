"""The process that does one piece of work: `python -m lox_space.worker`, run by `jobs.py`.

It reads what to do from standard input, where no other process can see a token, and prints one line of JSON: the
result, or the message for who asked. It runs in a folder of its own, with the Hub's cache in it; nothing that is named
on the page can therefore be a folder of the machine by accident, and nothing outlives the job.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lox_hf import LoxConfig, LoxError, harden_checkpoint, plan_hardening
from lox_hf.hub.artefact import open_artefact
from lox_hf.hub.card import make_card
from lox_hf.hub.metadata import inherit
from lox_hf.hub.push import push_to_hub
from lox_space.form import Model
from lox_space.lookup import Found, look_up, sketch

HARDENED = "hardened"
NOT_YET_NAMED = "your-name/model-lox"


def plan(order: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """Look both models up, check their sizes, and plan from the headers of their weights.

    Args:
        order: Fields of an `Order`.
        max_bytes: The largest model that is taken.

    Returns:
        The plan, and what was found.
    """
    found = {role: look_up(Model(**order[role]), role, max_bytes) for role in ("aligned", "base")}
    Path("sketch").mkdir()
    os.chdir("sketch")
    aligned, base = (_outline(found[role], role) for role in ("aligned", "base"))
    planned = plan_hardening(aligned, LoxConfig(base, r=order["r"], alpha=order["alpha"]))
    models = {role: vars(model) | {"download_bytes": model.download_bytes} for role, model in found.items()}
    return {"plan": json.loads(planned.to_json()), **models}


def harden(order: dict[str, Any], aligned: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Download both models at the commits that were planned with, and harden.

    Args:
        order: Fields of an `Order`.
        aligned: Name and commit of the aligned model.
        base: Name and commit of the base.

    Returns:
        The report, and the text of the model card.
    """
    config = LoxConfig(base["name"], revision=base["revision"], r=order["r"], alpha=order["alpha"])
    revision = aligned["revision"]
    report = harden_checkpoint(aligned["name"], HARDENED, config, revision=revision, token=False, progressbar=False)
    artefact = open_artefact(HARDENED)
    card = make_card(artefact, repo_id=NOT_YET_NAMED, inherited=inherit(artefact, token=False))
    return {"report": json.loads(report.to_json()), "card": card.text.strip()}


def push(repo_id: str, token: str, private: bool) -> dict[str, Any]:
    """Upload the hardened model with its card.

    Args:
        repo_id: Repository.
        token: The user's token.
        private: Whether a new repository is private.

    Returns:
        URL of the commit.
    """
    return {"url": push_to_hub(HARDENED, repo_id, private=private, token=token).commit_url}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"plan": plan, "harden": harden, "push": push}


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Do one piece of work.

    Args:
        task: Its name as "task", and its arguments.

    Returns:
        The "result" with "warnings", or the "error" for who asked.
    """
    given = dict(task)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            result = TASKS[given.pop("task")](**given)
    except LoxError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"The machine of this page cannot do it: {error.strerror or type(error).__name__}."}
    texts = {str(item.message) for item in told if issubclass(item.category, UserWarning)}
    return {"result": result, "warnings": sorted(texts)}


def main() -> None:
    """Do what standard input says, and print the answer and nothing else."""
    task = json.loads(sys.stdin.buffer.read())
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(answer(task)), file=out)


def _outline(found: Found, role: str) -> str:
    """What the plan reads: the folder itself, or a sketch of the repository under the name that messages show."""
    if found.revision is None:
        return found.name
    name = found.name if not Path(found.name).exists() else f"{found.name}@{role}"
    sketch(found, Path(name))
    return name


if __name__ == "__main__":
    main()
