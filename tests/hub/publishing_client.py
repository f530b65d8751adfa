"""What a user publishes and loads, for `test_push.py`: a program, since the Hub's client reads its settings on import.

It runs the named functions on a folder and prints their results as one line of JSON, the last on standard output.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lox_hf
from lox_hf import (
    LoxConfig,
    SafetySubspace,
    apply_lox,
    extract_lox_adapter,
    get_lox_model,
    harden_checkpoint,
    push_to_hub,
)

CARD = b"""---
license: apache-2.0
language: [en, pt]
datasets: [org/preferences]
base_model: org/base
---
# The aligned model
"""
CONFIG = LoxConfig("org/base", r=2, alpha=0.5)


def make(root: Path) -> list[str]:
    """Upload the pair, and harden it by its ids in all forms."""
    api = huggingface_hub.HfApi()
    for name in ("aligned", "base", "alignment"):
        api.create_repo(f"org/{name}")
        api.upload_folder(folder_path=root / name, repo_id=f"org/{name}")
    api.upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id="org/aligned")
    harden_checkpoint("org/aligned", root / "dense", CONFIG)
    extract_lox_adapter("org/aligned", root / "adapter", CONFIG)
    harden_checkpoint("org/alignment", root / "hardened-adapter", LoxConfig(r=2))
    SafetySubspace.from_models("org/aligned", "org/base", CONFIG).save_pretrained(root / "subspace")
    return [str(lox_hf.__file__)]


def dry_run(root: Path) -> dict[str, Any]:
    """Plan everything."""
    names = ("dense", "adapter", "hardened-adapter", "subspace")
    reports = {name: push_to_hub(root / name, f"org/{name}", dry_run=True) for name in names}
    return {name: [report.commit_url, len(report.card)] for name, report in reports.items()}


def push_all(root: Path) -> dict[str, Any]:
    """Publish everything, the dense model with what was measured of it."""
    runs = [root / "before", root / "after", root / "after-utility"]
    reports = {
        "dense": push_to_hub(root / "dense", "org/dense", evaluation=runs),
        "adapter": push_to_hub(root / "adapter", "org/adapter", private=False, license="mit"),
        "hardened-adapter": push_to_hub(root / "hardened-adapter", "org/hardened-adapter"),
        "subspace": push_to_hub(root / "subspace", "org/subspace"),
    }
    return {name: report.to_dict() for name, report in reports.items()}


def push_loaded(root: Path) -> dict[str, Any]:
    """Publish models that were hardened in this process."""
    tokenizer = AutoTokenizer.from_pretrained("org/aligned")
    model = apply_lox(AutoModelForCausalLM.from_pretrained("org/aligned"), CONFIG)
    dense = push_to_hub(model, "org/loaded", tokenizer=tokenizer)
    peft_model = get_lox_model(AutoModelForCausalLM.from_pretrained("org/aligned"), CONFIG)
    adapter = push_to_hub(peft_model, "org/loaded-adapter")
    model.push_to_hub("org/stamped")
    alignment = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "org/alignment")
    hardened = push_to_hub(apply_lox(alignment, LoxConfig(r=2)), "org/loaded-alignment")
    untouched = AutoModelForCausalLM.from_pretrained("org/aligned")
    return {
        "dense": dense.to_dict(),
        "adapter": adapter.to_dict(),
        "alignment": hardened.to_dict(),
        "untouched": _error(lambda: push_to_hub(untouched, "org/never")),
        "number": _error(lambda: push_to_hub(7, "org/never")),
    }


def load(root: Path) -> dict[str, Any]:
    """Read back what our own classes read."""
    report, local = lox_hf.load_report("org/dense"), lox_hf.load_report(root / "dense")
    subspace = SafetySubspace.from_pretrained("org/subspace")
    card = huggingface_hub.ModelCard.load("org/dense")
    card.validate()
    return {
        "report": report == local and report.to_json() == local.to_json(),
        "config": LoxConfig.from_pretrained("org/dense") == LoxConfig.from_pretrained(root / "dense"),
        "subspace": [subspace.config.r, len(subspace.factors), subspace.report.aligned.to_dict()],
        "results": [[item.metric_type, item.metric_value] for item in card.data.eval_results],
        "no report": _error(lambda: lox_hf.load_report("org/aligned")),
    }


def push_dense(root: Path) -> str:
    """Publish the dense model; what the client says while it waits and tries again goes to standard error."""
    time.sleep = lambda seconds: None
    return _error(lambda: push_to_hub(root / "dense", "org/cut"))


def push_again_and_again(root: Path) -> list[str]:
    """Publish the adapter until it works, at most eight times."""
    waits: list[float] = []
    time.sleep = waits.append
    said = []
    for _ in range(8):
        said.append(_error(lambda: push_to_hub(root / "adapter", "org/faults")))
        if said[-1] == "no error":
            break
    return [*said, str(max(waits))]


def refused(root: Path) -> dict[str, str]:
    """What is not published, and why."""
    return {
        "no login": _error(lambda: push_to_hub(root / "dense", "org/never", token=False)),
        "bad token": _error(lambda: push_to_hub(root / "dense", "org/never", token="hf_with a space")),
        "not ours": _error(lambda: push_to_hub(root / "aligned", "org/never")),
        "plain adapter": _error(lambda: push_to_hub(root / "alignment", "org/never")),
        "no folder": _error(lambda: push_to_hub(root / "nowhere", "org/never")),
        "no owner": _error(lambda: push_to_hub(root / "dense", "never")),
        "bad id": _error(lambda: push_to_hub(root / "dense", "org/a b")),
        "over the aligned": _error(lambda: push_to_hub(root / "dense", "org/Aligned")),
        "over the base": _error(lambda: push_to_hub(root / "adapter", "org/base")),
        "public": _error(lambda: push_to_hub(root / "adapter", "org/adapter")),
        "licence": _error(lambda: push_to_hub(root / "dense", "org/never", license="Do what: you\nlike")),
        "no evaluation": _error(lambda: push_to_hub(root / "dense", "org/never", evaluation=root / "dense")),
        "two": _error(lambda: push_to_hub(root / "dense", "org/never", evaluation=[root / "before", root / "other"])),
        "card": _error(lambda: push_to_hub(root / "dense", "org/invalid-card")),
    }


def smaller(root: Path) -> list[str]:
    """Publish the dense model anew, in fewer shards and without an evaluation."""
    model = AutoModelForCausalLM.from_pretrained(root / "dense")
    model.save_pretrained(root / "one-shard")
    for name in ("lox_config.json", "lox_report.json"):
        (root / "one-shard" / name).write_bytes((root / "dense" / name).read_bytes())
    return list(push_to_hub(root / "one-shard", "org/dense").removed)


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        results = {name: globals()[name](Path(sys.argv[1])) for name in sys.argv[2:]}
    results["warnings"] = sorted({str(item.message) for item in caught if issubclass(item.category, UserWarning)})
    print(json.dumps(results))
