"""Measure what hardening from Hub to Hub and verifying cost in memory and disk, against a Hub on localhost.

    python benchmarks/hub.py                   # a pair of 0.4 GB a side: about two minutes
    python benchmarks/hub.py --layers 2        # a smaller one

Prints a table and writes JSON. The exit code is 1 when a judged figure misses its target.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import HERE, SAMPLE_PERIOD_S, ChildError, anonymous_bytes, serve_job
from table import Row, collect, publish

MIB = 2**20
TOKEN = "hf_benchmark"
HIDDEN, INNER, VOCABULARY = 1024, 4096, 32000
SHARD_BYTES = 64 * MIB
MEMORY_LIMIT = 220 * MIB
"""That of `harden_checkpoint`."""


@dataclass(frozen=True)
class Watched:
    """A finished child, with the peaks of its memory and of its files in the work folder."""

    wall_s: float
    peak_anonymous_bytes: int
    peak_disk_bytes: int
    samples: int
    result: dict[str, Any]


def make_pair(folder: str, layers: int) -> dict[str, Any]:
    """Write a base and an aligned model: embedding and head fill a shard each, the layers share others."""
    import torch
    from safetensors.torch import save_file

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (HIDDEN, INNER), f"{prefix}.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    generator, shards = torch.Generator().manual_seed(0), _cut(shapes)
    for side in ("base", "aligned"):
        (Path(folder) / side).mkdir(parents=True)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        base = {name: (0.02 * torch.randn(shapes[name], generator=generator)).bfloat16() for name in names}
        aligned = {name: _moved(tensor, generator) for name, tensor in base.items()}
        save_file(base, Path(folder) / "base" / file, {"format": "pt"})
        save_file(aligned, Path(folder) / "aligned" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    for side in ("base", "aligned"):
        (Path(folder) / side / "config.json").write_text('{"model_type": "llama"}')
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (Path(folder) / side / "model.safetensors.index.json").write_text(index)
    return {}


def harden(repo_id: str, work_dir: str) -> dict[str, Any]:
    """Harden from Hub to Hub."""
    from lox_hf import LoxConfig, harden_to_hub

    started = time.perf_counter()
    report = harden_to_hub("org/aligned", repo_id, LoxConfig("org/base"), work_dir=work_dir, progressbar=False)
    return {"call_s": time.perf_counter() - started, "matrices": len(report.tensors)}


def check(repo_id: str, work_dir: str) -> dict[str, Any]:
    """Verify what was published, from the Hub."""
    from lox_hf import verify

    started = time.perf_counter()
    report = verify(repo_id, work_dir=work_dir, progressbar=False)
    exact = sum(item.verdict == "exact" for item in report.tensors)
    return {"call_s": time.perf_counter() - started, "exact": exact, "tensors": len(report.tensors)}


def _cut(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _moved(base: Any, generator: Any) -> Any:
    """A tensor after alignment: eight directions and noise."""
    import torch

    if base.dim() == 1:
        return base
    left, right = (torch.randn(side, 8, generator=generator) / side**0.5 for side in base.shape)
    noise = 1e-4 * torch.randn(base.shape, generator=generator)
    return (base.float() + 0.5 * left @ right.T + noise).bfloat16()


def _watch(job: str, arguments: dict[str, Any], work_dir: Path, url: str, threads: int) -> Watched:
    """Run a job in a process that knows no Hub but this one, and sample it until it ends."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment |= {
        "HF_HOME": str(work_dir.parent / "home"),
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, str(HERE / "hub.py"), job, json.dumps(arguments)]
    started, memory, disk, samples = time.monotonic(), 0, 0, 0
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)
        while process.poll() is None:
            memory = max(memory, anonymous_bytes(process.pid))
            disk = max(disk, _disk_bytes(process.pid, work_dir))
            samples += 1
            time.sleep(SAMPLE_PERIOD_S)
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode != 0:
            raise ChildError(stderr.read()[-3000:])
        result = json.loads(stdout.read().rstrip().rpartition("\n")[2])
    return Watched(time.monotonic() - started, memory, disk, samples, result)


def _disk_bytes(pid: int, folder: Path) -> int:
    """Blocks of all files of a folder, those without a name that a process still has open or mapped among them."""
    blocks: dict[tuple[int, int], int] = {}
    names = [path for path in folder.rglob("*")]
    opened = Path(f"/proc/{pid}/fd")
    try:
        names += [path for path in opened.iterdir() if os.readlink(path).startswith(str(folder))]
    except OSError:  # it has ended, or has closed one meanwhile: the next sample is near
        pass
    for path in names:
        try:
            status = path.stat()
        except OSError:
            continue
        blocks[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(blocks.values())


def _measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Upload the pair, run, and judge."""
    sys.path.append(str(HERE.parent / "tests"))
    from fake_hub import FakeHub, Repo

    subprocess.run(
        [sys.executable, str(HERE / "hub.py"), "pair", json.dumps({"folder": str(folder), "layers": options.layers})],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    work_dir = folder / "work"
    work_dir.mkdir()
    with FakeHub(TOKEN) as hub:
        for side in ("aligned", "base"):
            hub.repos[f"org/{side}"] = Repo()
            hub.repos[f"org/{side}"].commit({path.name: path.read_bytes() for path in (folder / side).iterdir()})
        shards = [path.stat() for path in (folder / "aligned").glob("*.safetensors")]
        total_bytes, limit = sum(shard.st_size for shard in shards), 2 * max(shard.st_blocks * 512 for shard in shards)
        for threads in options.threads:
            repo_id = f"org/hardened-{threads}"
            arguments = {"repo_id": repo_id, "work_dir": str(work_dir)}
            for job, name in (("harden", "harden_to_hub"), ("check", "verify")):
                done = _watch(job, arguments, work_dir, hub.url, threads)
                where = f"{name}, {len(shards)} shards, {_mib(total_bytes)} in all, threads: {threads}"
                peak, disk = done.peak_anonymous_bytes, done.peak_disk_bytes
                details = {
                    "wall_s": done.wall_s,
                    "samples": done.samples,
                    "anonymous_bytes": peak,
                    "disk_bytes": disk,
                    **done.result,
                }
                memory = f"{where}: anonymous memory"
                yield Row(memory, f"at most {_mib(MEMORY_LIMIT)}", _mib(peak), peak <= MEMORY_LIMIT, details=details)
                judged = job == "harden"
                target = f"at most two shards, {_mib(limit)}" if judged else "-"
                met = disk <= limit if judged else None
                yield Row(f"{where}: disk", target, _mib(disk), met, details=details | {"limit_bytes": limit})
                if job == "check":
                    exact = f"{done.result['exact']} of {done.result['tensors']} tensors"
                    met = done.result["exact"] == done.result["tensors"]
                    yield Row(f"{where}: equal bit for bit", "all", exact, met, correctness=True, details=details)


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


def main() -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10, help="layers of 32 MiB a side (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads (default: 1 2)")
    parser.add_argument("--work-dir", type=Path, help="on a real disk, not a tmpfs (default: TMPDIR)")
    parser.add_argument("--json", type=Path, default=Path("hub.json"), help="where the record goes")
    options = parser.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        results = collect(_measure(options, Path(folder).resolve()))
    return publish(results, options.json, vars(options), started, quick=False)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("pair", "harden", "check"):
        serve_job({"pair": make_pair, "harden": harden, "check": check})
    else:
        sys.exit(main())
