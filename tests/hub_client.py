"""What a user does with the Hub, for `test_hub.py`: a program, since the client reads its settings when imported.

It runs the named functions on a folder and prints their results as one line of JSON, the last on standard output.
"""

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import huggingface_hub

from lox_hf import LoxConfig, SafetySubspace, harden_checkpoint, plan_hardening
from lox_hf.cli.main import main

CONFIG = LoxConfig("org/base", r=3, alpha=0.5, exclude_modules=["lm_head"], rank_pattern={"q_proj": 2})


def upload(root: Path) -> list[str]:
    """Upload the pair, the aligned model with a card and without one, and an adapter."""
    api = huggingface_hub.HfApi()
    repos = {"aligned": "aligned", "base": "base", "adapter": "adapter", "carded": "aligned", "private": "aligned"}
    for name, folder in repos.items():
        api.create_repo(f"org/{name}", private=name == "private" or None)
        api.upload_folder(folder_path=root / folder, repo_id=f"org/{name}")
    card = b"---\nbase_model: org/base\n---\n# A card\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="org/carded")
    return [api.whoami()["name"], *sorted(huggingface_hub.list_repo_files("org/adapter"))]


def config(root: Path) -> dict[str, Any]:
    """A config there and back, by its newest commit and by an older one."""
    first = CONFIG.push_to_hub("org/config").rpartition("/")[2]
    LoxConfig(r=None).push_to_hub("org/config", commit_message="Change the rank")
    loaded = [LoxConfig.from_pretrained("org/config", revision=revision) for revision in (first, None)]
    return {"same": loaded[0] == CONFIG, "newest": loaded[1] == LoxConfig(r=None)}


def subspace(root: Path) -> dict[str, Any]:
    """A subspace there and back, and an edit with it."""
    made = SafetySubspace.from_models("org/aligned", "org/base", LoxConfig(r=3))
    made.push_to_hub("org/subspace", private=True)
    found = SafetySubspace.from_pretrained("org/subspace")
    pairs = [(made.factors[name], found.factors[name]) for name in made.factors]
    harden_checkpoint("org/aligned", root / "by-subspace", LoxConfig(r=2), base_model=found)
    return {
        "names": list(made.factors) == list(found.factors),
        "bits": all(getattr(a, part).equal(getattr(b, part)) for a, b in pairs for part in ("U", "S", "Vh")),
        "config": made.config == found.config,
        "report": made.report == found.report,
        "models": made.report.to_dict()["aligned"] | {"base": made.report.to_dict()["base"]},
    }


def harden(root: Path) -> dict[str, Any]:
    """Both sides by id: planned, hardened, the base found in a card, a private model, an adapter."""
    settings = LoxConfig("org/base", r=2)
    plan = plan_hardening("org/aligned", settings)
    report = harden_checkpoint("org/aligned", root / "hardened", settings)
    carded = plan_hardening("org/carded", LoxConfig(r=2))
    kept = [_is_cached("org/aligned"), _is_cached("org/carded")]
    token = huggingface_hub.get_token()
    private = plan_hardening("org/private", settings, token=token)
    adapter = harden_checkpoint("org/adapter", root / "hardened-adapter", LoxConfig(r=2))
    return {
        "plan": [plan.to_dict()[side] for side in ("aligned", "base")],
        "report": [report.to_dict()[side] for side in ("aligned", "base")],
        "carded": [carded.to_dict()["base"], carded.base_found_in],
        "kept": kept,
        "private": private.aligned.name_or_path,
        "adapter": [adapter.to_dict()["aligned"], adapter.base, len(adapter.tensors)],
    }


def _is_cached(repo_id: str) -> bool:
    """Whether a model's weights are on this machine."""
    found = huggingface_hub.try_to_load_from_cache(repo_id, "config.json")
    return isinstance(found, str) and any(Path(found).parent.glob("*.safetensors"))


def errors(root: Path) -> dict[str, str]:
    """Everything that goes wrong while the Hub answers."""
    base = LoxConfig("org/base", r=2)
    subspace = SafetySubspace.from_pretrained("org/subspace")
    return {
        "unknown repo": _error(lambda: plan_hardening("org/nothing", base)),
        "unknown base": _error(lambda: plan_hardening("org/aligned", LoxConfig("org/nothing"))),
        "no login": _error(lambda: plan_hardening("org/hidden", base, token=False)),
        "unknown branch": _error(lambda: plan_hardening("org/aligned", base, revision="v9")),
        "unknown commit": _error(lambda: plan_hardening("org/aligned", base, revision="0" * 40)),
        "base revision": _error(lambda: plan_hardening("org/aligned", LoxConfig("org/base", revision="v9"))),
        "file revision": _error(lambda: LoxConfig.from_pretrained("org/config", revision="v9")),
        "missing file": _error(lambda: LoxConfig.from_pretrained("org/aligned")),
        "no such repo for a file": _error(lambda: LoxConfig.from_pretrained("org/nothing")),
        "no weights": _error(lambda: plan_hardening("org/config", base)),
        "gated": _error(lambda: plan_hardening("org/gated", base)),
        "gated file": _error(lambda: LoxConfig.from_pretrained("org/gated")),
        "push without login": _error(lambda: CONFIG.push_to_hub("org/new", token=False)),
        "push to no id": _error(lambda: CONFIG.push_to_hub("not an id")),
        "upload refused": _error(lambda: subspace.push_to_hub("org/full")),
    }


def command_line(root: Path) -> dict[str, Any]:
    """A mistake on the command line: exit code, and what stands on standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["harden", "org/gated", "--base-model", "org/base", "--output", str(root / "never")])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def unreachable(root: Path) -> dict[str, str]:
    """Both directions while the Hub is out of reach, with a model that is not in the cache."""
    return {
        "harden": _error(lambda: harden_checkpoint("org/other", root / "never", LoxConfig("org/base", r=2))),
        "base": _error(lambda: plan_hardening(str(root / "aligned"), LoxConfig("org/other", r=2))),
        "push": _error(lambda: CONFIG.push_to_hub("org/other")),
    }


def files_offline(root: Path) -> dict[str, str]:
    """Single files, for which the client tries again for half a minute unless it knows that it is offline."""
    return {
        "config": _error(lambda: LoxConfig.from_pretrained("org/other")),
        "commit": _error(lambda: LoxConfig.from_pretrained("org/config", revision="0" * 40)),
        "subspace": _error(lambda: SafetySubspace.from_pretrained("org/other")),
    }


def cached(root: Path) -> dict[str, str]:
    """What was downloaded before is enough."""
    base = LoxConfig("org/base", r=2)
    return {
        "plan": _error(lambda: plan_hardening("org/aligned", base)),
        "config": _error(lambda: LoxConfig.from_pretrained("org/config")),
    }


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    print(json.dumps({name: globals()[name](Path(sys.argv[1])) for name in sys.argv[2:]}))
