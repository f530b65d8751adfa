"""Record what the authors' own script gives on pairs of the zoo, as figures.

    python tests/parity/record_reference.py CHECKOUT

CHECKOUT is a checkout of github.com/VITA-Group/LoX. Its `safety/LoX.py` runs unmodified, in a process of its own, on
pairs that `tests/zoo.py` builds bit for bit from a seed. Figures of its output go into `reference_figures.json` beside
this file; none of its code does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import oracle
import zoo

FIGURES = Path(__file__).with_name("reference_figures.json")
KINDS = ("llama", "llama_tied", "gpt2")
RUNS = ((0, 1.0), (2, 1.0), (6, 1.25))
SEED = 20250618
SAMPLES = 16


def sample(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Take entries at positions that only the tensor's name and size decide."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return tensor.flatten()[torch.from_numpy(rng.integers(0, tensor.numel(), SAMPLES))]


def operand_ulp(*operands: torch.Tensor) -> torch.Tensor:
    """Return bfloat16's spacing at the largest of the magnitudes that met in each entry.

    Where aligned and its change cancel, the result's own spacing says nothing about the arithmetic that led there.
    """
    largest = torch.stack([operand.double().abs() for operand in operands]).amax(dim=0)
    return torch.exp2(torch.floor(torch.log2(largest.clamp_min(torch.finfo(torch.bfloat16).tiny))) - 7)


def record_tensor(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Record the shape, norm, sum and sampled entries of one tensor."""
    exact = tensor.double()
    return {
        "shape": list(tensor.shape),
        "norm": float(f"{exact.norm().item():.9g}"),
        "sum": float(f"{exact.sum().item():.9g}"),
        # Nine digits give any bfloat16 back exactly.
        "sample": [float(f"{value:.9g}") for value in sample(name, exact).tolist()],
    }


def record_run(checkout: Path, pair: zoo.Pair, k: int, coef: float, folder: Path) -> dict[str, Any]:
    """Run the reference on a pair and record its output, and how far that is from the exact result."""
    output = folder / f"{pair.kind}-{k}"
    command = [sys.executable, str(checkout / "safety" / "LoX.py"), "--model", str(pair.aligned_dir)]
    command += ["--base-model", str(pair.base_dir), "--save-path", str(output), "--k", str(k), "--coef", str(coef)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    hardened, aligned, base = zoo.read_checkpoint(output), pair.aligned(), pair.base()
    exact = oracle.expected_hardened(aligned, base, k or None, coef)
    assert set(hardened) == set(exact)
    differing = sum(int((hardened[name] != exact[name].to(pair.dtype)).sum()) for name in exact)
    errors = [
        (hardened[name].double() - exact[name]).abs() / operand_ulp(aligned[name], base[name], exact[name])
        for name in exact
    ]
    return {
        "k": k,
        "coef": coef,
        # Against the exact result rounded once: how often another number, and how far off at most.
        "differing_share": float(f"{differing / sum(error.numel() for error in errors):.3g}"),
        "largest_error_ulp": float(f"{max(error.max().item() for error in errors):.3g}"),
        "tensors": {name: record_tensor(name, tensor) for name, tensor in sorted(hardened.items())},
    }


def record_pair(checkout: Path, kind: str, folder: Path) -> dict[str, Any]:
    """Build a pair and record the reference's runs on it."""
    pair = zoo.save_pair(kind, folder / kind, seed=SEED)
    return {
        "aligned_sha256": zoo.fingerprint(pair.aligned()),
        "base_sha256": zoo.fingerprint(pair.base()),
        "runs": [record_run(checkout, pair, k, coef, folder) for k, coef in RUNS],
    }


def main() -> None:
    """Record all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the reference's repository")
    parser.add_argument("--commit", default="9213ce6", help="which commit of it is checked out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = {kind: record_pair(arguments.checkout.resolve(), kind, Path(folder)) for kind in KINDS}
    record = {
        "source": f"VITA-Group/LoX {arguments.commit}, safety/LoX.py, unmodified",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "seed": SEED,
        "pairs": pairs,
    }
    # One line a tensor: a change of one figure is a change of one line.
    text = json.dumps(record, indent=1)
    FIGURES.write_text(_one_line_lists(text) + "\n")


def _one_line_lists(text: str) -> str:
    """Put each list of numbers on one line."""
    lines, inside = [], False
    for line in text.splitlines():
        if inside:
            lines[-1] += line.strip() + (" " if line.endswith(",") and not line.strip().startswith("]") else "")
            inside = not line.strip().startswith("]")
        else:
            lines.append(line)
            inside = line.endswith(('"shape": [', '"sample": ['))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
