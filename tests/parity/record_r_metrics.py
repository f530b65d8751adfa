"""Record what the authors' own R metrics are on models of the zoo.

    python tests/parity/record_r_metrics.py CHECKOUT

CHECKOUT is a checkout of github.com/VITA-Group/LoX. Its `safety/R_metrics.py` runs unmodified, in a process of its
own, on models that are built bit for bit from a seed. The two numbers it prints go into `r_metrics_figures.json`
beside this file; none of its code does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo
from drift_oracle import fine_tune

FIGURES = Path(__file__).with_name("r_metrics_figures.json")
KINDS = ("llama", "llama_tied", "qwen2")
RANKS = (2, 6)
SEED = 20250618
UNCHANGED = "model.layers.0.mlp.up_proj.weight"


def tuned_model(pair: zoo.Pair) -> dict[str, torch.Tensor]:
    """Return the fine-tuned model's tensors."""
    return fine_tune(pair.aligned(), pair.base(), SEED)


def save_as(tensors: dict[str, torch.Tensor], like: Path, folder: Path) -> Path:
    """Save tensors as a checkpoint of the same architecture."""
    model = AutoModelForCausalLM.from_pretrained(like, dtype="auto")
    model.load_state_dict(tensors, strict=False)
    model.save_pretrained(folder)
    return folder


def without_one_change(pair: zoo.Pair) -> dict[str, torch.Tensor]:
    """Return the aligned tensors, but one matrix as it is in the base."""
    return {**pair.aligned(), UNCHANGED: pair.base()[UNCHANGED]}


def run(checkout: Path, model: Path, aligned: Path, base: Path, k: int) -> dict[str, float]:
    """Run the reference and read the numbers it prints."""
    command = [sys.executable, str(checkout / "safety" / "R_metrics.py"), "--model", str(model)]
    command += ["--aligned-model", str(aligned), "--base-model", str(base), "--k", str(k)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    found = dict(re.findall(r"^(R_\w+): ([\d.a-z]+)$", output, re.MULTILINE))
    return {"r_ft": float(found["R_ft"]), "r_align": float(found["R_align"])}


def record_pair(checkout: Path, kind: str, folder: Path) -> dict[str, Any]:
    """Build a pair and its fine-tuned model, and record the reference on them."""
    pair = zoo.save_pair(kind, folder / kind, seed=SEED)
    tuned = tuned_model(pair)
    path = save_as(tuned, pair.aligned_dir, folder / f"{kind}-tuned")
    return {
        "aligned_sha256": zoo.fingerprint(pair.aligned()),
        "base_sha256": zoo.fingerprint(pair.base()),
        "tuned_sha256": zoo.fingerprint(tuned),
        "runs": [{"k": k, **run(checkout, path, pair.aligned_dir, pair.base_dir, k)} for k in RANKS],
    }


def record_unchanged(checkout: Path, folder: Path) -> dict[str, Any]:
    """Record the reference where alignment left one matrix as it was."""
    pair = zoo.save_pair("llama", folder / "unchanged", seed=SEED)
    aligned = save_as(without_one_change(pair), pair.aligned_dir, folder / "unchanged-aligned")
    figures = run(checkout, aligned, aligned, pair.base_dir, RANKS[0])
    return {"matrix": UNCHANGED, **{name: str(value) for name, value in figures.items()}}


def main() -> None:
    """Record all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the reference's repository")
    parser.add_argument("--commit", default="9213ce6", help="which commit of it is checked out")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    with tempfile.TemporaryDirectory() as folder:
        pairs = {kind: record_pair(checkout, kind, Path(folder)) for kind in KINDS}
        unchanged = record_unchanged(checkout, Path(folder))
    record = {
        "source": f"VITA-Group/LoX {arguments.commit}, safety/R_metrics.py, unmodified",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "seed": SEED,
        "pairs": pairs,
        "unchanged": unchanged,
    }
    FIGURES.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
