"""What a user does with models on the Hub that are read by ranges: a program, as the client reads its settings once.

It runs the named functions on a folder and prints their results as one line of JSON, the last on standard output.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lox_hf import LoxConfig, SafetySubspace, harden_to_hub, plan_to_hub, verify
from lox_hf.cli.main import main
from lox_hf.weights import ranges

SETTINGS: dict[str, Any] = {"r": 3, "exclude_modules": ["lm_head"]}
ranges.FIRST_WAIT_S = 0.01  # as patient, in less time


def harden(root: Path) -> dict[str, Any]:
    """From the Hub to the Hub."""
    report = harden_to_hub("org/aligned", "org/hardened", _settings(), work_dir=root / "work")
    return {
        "url": report.output,
        "left": [path.name for path in (root / "work").iterdir()],
        "cached": [path.name for path in (root / "home").rglob("*.safetensors")],
    }


def harden_again(root: Path) -> str:
    """The same once more, as after a run that was killed."""
    return _outcome(lambda: harden_to_hub("org/aligned", "org/again", _settings(), work_dir=root / "work"))


def harden_folders(root: Path) -> str:
    """From folders to the Hub, with a subspace in place of a base."""
    subspace = SafetySubspace.from_models(str(root / "aligned"), str(root / "base"), LoxConfig(r=3))
    config = LoxConfig(r=3, exclude_modules=["lm_head"])
    return _outcome(lambda: harden_to_hub(root / "aligned", "org/from-folders", config, base_model=subspace))


def renew(root: Path) -> str:
    """From folders into a repository that holds an earlier model's evaluation."""
    config = LoxConfig(str(root / "base"), **SETTINGS)
    return _outcome(lambda: harden_to_hub(root / "aligned", "org/renewed", config, work_dir=root / "work"))


def refused(root: Path) -> dict[str, str]:
    """What is refused before any work."""
    work = {"work_dir": root / "work"}
    return {
        "input": _outcome(lambda: plan_to_hub("org/aligned", "org/base", _settings(), **work)),
        "others": _outcome(lambda: plan_to_hub("org/aligned", "org/other", _settings(), **work)),
        "adapter": _outcome(lambda: plan_to_hub("org/adapter", "org/new", _settings(), **work)),
        "no folder": _outcome(lambda: plan_to_hub(root / "nothing", "org/new", _settings(), **work)),
        "no work folder": _outcome(lambda: plan_to_hub("org/aligned", "org/new", _settings(), work_dir="/nowhere")),
        "no revision": _outcome(lambda: plan_to_hub("org/aligned", "org/new", _settings(), revision="v9", **work)),
        "not an id": _outcome(lambda: harden_to_hub("org/aligned", "not an id", _settings(), **work)),
        "no owner": _outcome(lambda: harden_to_hub("org/aligned", "alone", _settings(), **work)),
        "bad token": _outcome(lambda: harden_to_hub("org/aligned", "org/new", _settings(), token="hf_a b", **work)),
        "public": _outcome(lambda: plan_to_hub("org/aligned", "org/public", _settings(), **work)),
        "no login": _outcome(lambda: harden_to_hub("org/aligned", "org/new", _settings(), token=False, **work)),
    }


def check(root: Path) -> dict[str, Any]:
    """Verify what was published, from the Hub alone."""
    report = verify("org/hardened", work_dir=root / "work")
    return {
        "verified": report.verified,
        "exact": all(check.verdict == "exact" for check in report.tensors),
        "models": [report.model.revision, report.aligned.revision, report.base and report.base.revision],
        "left": [path.name for path in (root / "work").iterdir()],
    }


def check_altered(root: Path) -> dict[str, Any]:
    """Verify copies on the Hub that were tampered with."""
    flipped = verify("org/flipped")
    return {
        "flipped": [flipped.verified, [check.name for check in flipped.wrong]],
        "gone": _outcome(lambda: verify("org/gone")),
        "command": main(["verify", "org/flipped"]),
    }


def command(root: Path) -> int:
    """The command line."""
    words = ["--r", "3", "--exclude-modules", "lm_head", "--base-model", "org/base", "--push-to", "org/by-command"]
    planned = main(["harden", "org/aligned", *words, "--dry-run"])
    return planned or main(["harden", "org/aligned", *words, "--work-dir", str(root / "work")])


def _settings() -> LoxConfig:
    return LoxConfig("org/base", **SETTINGS)


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    print("\n" + json.dumps({name: globals()[name](Path(sys.argv[1])) for name in sys.argv[2:]}))
