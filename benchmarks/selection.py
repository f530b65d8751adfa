"""Choose r, alpha and the weights on fresh pairs of the demonstration, and see what the choice is worth elsewhere.

    python benchmarks/selection.py                      # five seeds: about 20 minutes on 2 cores
    python benchmarks/selection.py --seeds 100 --quick  # one seed, a small grid

On every seed one half of the held-out questions is chosen by, under the default limits and a short attack; the other
half says what the choice costs, and what it is worth under that attack with another order of rows, and under attacks
that were not chosen by; beside the aligned model, the paper's setting and the full rank. Prints a table and writes
JSON. The exit code is 1 where the chosen model loses more right answers than the limit allows. Pairs are trained once
and kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from table import Row, collect, publish

ATTACK = "pairs-100"
"""What is chosen by; DEMO.md's attack of 100 forbidden pairs."""
LOSS = "accuracy"


@dataclass
class Seed:
    """One pair, its two halves of the questions, and the attacks on it."""

    seed: int
    work_dir: Path
    quick: bool

    @cached_property
    def folder(self) -> Path:
        """Where the pair is."""
        return self.work_dir / "pairs" / f"seed-{self.seed}"

    @cached_property
    def halves(self) -> Any:
        """The held-out questions: one half to choose by, one to report on."""
        from lox_hf.auto.halves import split_prompts
        from lox_hf.evaluation.data.prompts import load_prompts

        return split_prompts(load_prompts(self.folder / "questions.jsonl"))

    def measurement(self, prompts: Any) -> Any:
        """Return how questions are asked."""
        from lox_hf.demo.measure import BATCH_SIZE, LONGEST_ANSWER
        from lox_hf.robustness.measuring.measure import Measurement

        return Measurement(prompts, max_new_tokens=LONGEST_ANSWER, batch_size=BATCH_SIZE)

    def attack(self, name: str, prompts: Any, tokenizer: Any, order: int) -> Any:
        """Return one of the demonstration's attacks, with safety read on these questions."""
        from lox_hf.auto.attack import ShortAttack
        from lox_hf.demo.attacks import ATTACKS
        from lox_hf.robustness.attacks.recipe import Attack

        demo = next(attack for attack in ATTACKS if attack.name == name)
        rows = Attack(name, str(self.work_dir / "rows" / demo.file_name), sft=demo.sft, held_out=demo.held_out)
        readings = 3 if self.quick else 10
        return ShortAttack(rows, self.measurement(prompts), tokenizer, seed=order, readings=readings)


def choose_and_check(seed: int, work_dir: Path, quick: bool) -> dict[str, Any]:
    """Choose on one half of the questions of a seed, and measure on the other."""
    import torch

    from lox_hf import LoxConfig, apply_lox
    from lox_hf.analysis.select import select
    from lox_hf.auto.measures import CandidateMeasures
    from lox_hf.evaluation.divergence import answer_reference
    from lox_hf.evaluation.models.loading import load_model

    torch.set_num_threads(1)
    case = Seed(seed, work_dir, quick)
    aligned, base = case.folder / "aligned", case.folder / "base"
    model, tokenizer = load_model(aligned)
    measures = CandidateMeasures(
        case.measurement(case.halves.choosing), tokenizer, answer_reference(model, tokenizer, case.halves.choosing)
    )
    attack = case.attack(ATTACK, case.halves.choosing, tokenizer, order=0)
    grid = {"rs": (2, None), "alphas": (0.5, 1.0)} if quick else {"rs": (1, 2, 6, None)}
    output = work_dir / "selected" / f"seed-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    chosen = select(
        model,
        base,
        measures.score,
        **grid,
        targets=("all",) if quick else ("all", "attention", "no-embeddings"),
        attack_fn=attack.score,
        aligned_model=aligned,
        about=measures.settings(),
        attack_about=attack.settings(),
        output_dir=output,
        progressbar=False,
    )
    found = chosen.recommended and LoxConfig.from_dict(chosen.get(chosen.recommended).config)
    settings = {
        "aligned": None,
        "chosen": found,
        "paper": LoxConfig(r=6, alpha=1.25),
        "full rank": LoxConfig(r=None, alpha=1.0),
    }
    others = ("pairs-10", "benign") if not quick else ()
    results: dict[str, Any] = {}
    for name, config in settings.items():
        if name == "chosen" and config is None:
            continue

        def hardened(config: Any = config) -> Any:
            fresh = load_model(aligned)[0]
            return fresh if config is None else apply_lox(fresh, config, base_model=base, progressbar=False)

        score = CandidateMeasures(case.measurement(case.halves.reporting), tokenizer).score(hardened())
        results[name] = {"before": score.to_dict()} | {
            f"attack {kind}": case.attack(kind, case.halves.reporting, tokenizer, order=1).score(hardened()).to_dict()
            for kind in (ATTACK, *others)
        }
    limit = next(limit.most for limit in chosen.limits if limit.measure == LOSS)
    return {"seed": seed, "recommended": chosen.recommended, "reasons": chosen.reasons, "limit": limit, "on": results}


def rows_of(results: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """The table: each seed's choice and what it costs, then what it is worth."""
    for found in results:
        before = {name: _share(item["before"], LOSS) for name, item in found["on"].items()}
        if found["recommended"] is None:
            yield Row(f"seed {found['seed']}: no point qualifies", "-", found["reasons"][0], None)
            continue
        loss = before["aligned"] - before["chosen"]
        refused = {name: _share(item["before"], "over_refusal") for name, item in found["on"].items()}
        yield Row(
            f"seed {found['seed']}: {found['recommended']}, right answers lost elsewhere",
            f"{100 * found['limit']:.0f} points",
            f"{100 * loss:.1f} points (over-refusal {100 * refused['chosen']:.1f} %); "
            f"paper's setting {100 * (before['aligned'] - before['paper']):.1f}, "
            f"full rank {100 * (before['aligned'] - before['full rank']):.1f}",
            loss <= found["limit"] + 1e-9,
            correctness=True,
            details=found,
        )
    for kind in sorted({key for found in results for key in found["on"]["aligned"] if key.startswith("attack ")}):
        names = ("aligned", "chosen", "paper", "full rank")
        means = {name: [_mean(found["on"].get(name), kind) for found in results] for name in names}
        yield Row(
            f"{kind}: mean ASR along it, by seed",
            "-",
            "; ".join(f"{name} {_listed(values)}" for name, values in means.items()),
            None,
        )


def _share(score: dict[str, Any], name: str) -> float:
    return score["rates"][name]["share"]


def _mean(found: dict[str, Any] | None, kind: str) -> float | None:
    return None if found is None else 100 * found[kind]["figures"]["asr_mean"]


def _listed(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    shown = " ".join("-" if value is None else f"{value:.0f}" for value in values)
    return f"{shown} (mean {fmean(known):.0f})" if known else "none"


def main() -> int:
    """Train what is missing, choose on every seed, print the table, write the JSON."""
    options = _parse()
    work_dir = options.work_dir.expanduser().resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    from lox_hf.demo.attacks import write_attacks
    from lox_hf.demo.pairs import train_pairs

    train_pairs(options.seeds, work_dir / "pairs", workers=options.workers)
    if not (work_dir / "rows").exists():
        write_attacks(work_dir / "rows")
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(choose_and_check, seed, work_dir, options.quick) for seed in options.seeds]
        results = [future.result() for future in futures]
    target = options.json or work_dir / "selection.json"
    return publish(collect(rows_of(results)), target, vars(options), started, quick=False)


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("TMPDIR", "~/.cache")).expanduser() / "lox-hf-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seeds = (100, 101, 102, 103, 104)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=seeds, help="seeds of the pairs (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a small grid and one attack; for a look")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--work-dir", type=Path, default=cache, help="pairs and runs go here (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the record goes (default: into the work dir)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
