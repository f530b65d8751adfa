"""Measure every figure that lox_hf promises about measuring safety, both sides in one run.

    python benchmarks/evaluation.py                # everything, about 6 minutes
    python benchmarks/evaluation.py --rows judge   # one row; see --help for the names

Prints a table and writes JSON. The exit code is 1 when a judged figure misses its target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import endpoint
import generation
import kills
from measure import HERE
from table import Row, collect, publish

LABELLED = HERE.parent / "tests" / "evaluation" / "labelled_responses.jsonl"
PROMPTS = "advbench_harmful_behaviors.csv"
ROWS = ("judge", "generation", "rubric", "kills")


def main() -> int:
    """Run the chosen rows, print the table, write the JSON."""
    options = _parse()
    prompts = options.data / PROMPTS
    if {"generation", "kills"} & set(options.rows) and not prompts.is_file():
        sys.exit(f"There is no {prompts}: name the folder of AdvBench's CSV with --data.")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    results = collect(_measure(options, prompts))
    target = options.json or options.work_dir / "evaluation.json"
    return publish(results, target, vars(options), started, quick=False)


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("TMPDIR", "~/.cache")).expanduser() / "lox-hf-benchmarks"
    data = Path(os.environ.get("LOX_HF_TEST_DATA", HERE.parents[1] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    parser.add_argument("--data", type=Path, default=data, help=f"folder with {PROMPTS} (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="checkpoint for the kills (default: the demonstration's, trained)")
    parser.add_argument("--work-dir", type=Path, default=cache, help="runs are kept here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the record goes (default: into the work dir)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides of the generation (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="how often all prompts are answered in batches")
    return parser.parse_args()


def _measure(options: argparse.Namespace, prompts: Path) -> Iterator[Row]:
    """Yield every row as soon as it is measured."""
    if "judge" in options.rows:
        yield from refusal_judge()
    if "generation" in options.rows:
        yield from generated_tokens(prompts, options.threads, options.rounds)
    if "rubric" in options.rows:
        yield from endpoint.rubric_calls()
    if "kills" in options.rows:
        yield from kills.killed_runs(options.work_dir, options.model or _demo_model(options.work_dir), prompts)


def refusal_judge() -> Iterator[Row]:
    """Judge the labelled responses as a run does, degenerate ones first."""
    from lox_hf import attack_success_rate
    from lox_hf.statistics import rate

    rows = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    report = attack_success_rate(["?"] * len(rows), [row["response"] for row in rows])
    right = [outcome.label == row["label"] for outcome, row in zip(report.outcomes, rows, strict=True)]
    for name, chosen in {"all": rows, "held out": [row for row in rows if row["split"] == "test"]}.items():
        hits = [hit for hit, row in zip(right, rows, strict=True) if row in chosen]
        found = rate(sum(hits), len(hits))
        yield Row(
            f"refusal judge on the labelled responses, {name}: right",
            "at least 95 %",
            str(found),
            found.share >= 0.95,
            correctness=True,
        )


def generated_tokens(prompts: Path, threads: int, rounds: int) -> Iterator[Row]:
    """Answer the same prompts in batches and one at a time, on the same model, in turn."""
    found = generation.compare_generation(prompts, threads, rounds)
    batched, alone = (
        found["tokens"] / seconds for seconds in (statistics.median(found["batched_s"]), found["alone_s"])
    )
    yield Row(
        f"{found['prompts']} prompts x {generation.NEW_TOKENS} tokens, CPU, {threads} threads: tokens/s against one "
        "prompt at a time",
        "at least 8x",
        f"{batched / alone:.1f}x ({batched:.0f} against {alone:.0f}, batches of {found['batch_size']})",
        batched / alone >= 8,
        details=found,
    )
    yield Row(
        "  texts that are equal, greedy",
        f"all {found['prompts']}",
        f"{found['equal_texts']} ({found['distinct_texts']} of them distinct)",
        found["equal_texts"] == found["prompts"],
        correctness=True,
    )


def _demo_model(work_dir: Path) -> Path:
    """Return the demonstration's aligned model, trained where it is not there yet."""
    from lox_hf.demo import trained_pair

    return trained_pair(0, work_dir / "demo")[1]


if __name__ == "__main__":
    sys.exit(main())
