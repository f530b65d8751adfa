"""Measure what attack training costs beside plain TRL, on the same rows and settings, both sides in one run.

    python benchmarks/attacks.py               # about 2 minutes on one core
    python benchmarks/attacks.py --rounds 9    # more rounds, where the machine is busy

Prints a table and writes JSON. The exit code is 1 when a judged figure misses its target.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import run_job, serve_job
from table import Row, collect, publish

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MOST_SHARE = 0.05
VOCABULARY = 2048
ROWS, LENGTH = 240, 64
SEED = 3
SFT: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "max_grad_norm": 2.0,
    "gradient_checkpointing": True,
}


def main() -> int:
    """Measure, print the table, write the JSON."""
    options = _parse()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.time()
    results = collect(_measure(options))
    return publish(results, options.json or options.work_dir / "attacks.json", vars(options), started, quick=False)


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("TMPDIR", "~/.cache")).expanduser() / "lox-hf-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each side, in turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=cache, help="where the record goes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="the record's own path")
    return parser.parse_args()


def _measure(options: argparse.Namespace) -> Iterator[Row]:
    found = run_job("attacks.py", "compare", {"rounds": options.rounds}, options.threads).result
    ours, plain = (statistics.median(found[side]) for side in ("ours_cpu_s", "plain_cpu_s"))
    pairs = [one / other - 1 for one, other in zip(found["ours_cpu_s"], found["plain_cpu_s"], strict=True)]
    yield Row(
        f"attack training, {found['parameters'] / 1e6:.1f} M parameters, {found['steps']} steps: CPU-seconds more "
        "than plain SFTTrainer",
        f"at most {MOST_SHARE:.0%}",
        f"{ours / plain - 1:+.1%} ({ours:.2f} against {plain:.2f} s; pairs {min(pairs):+.1%} to {max(pairs):+.1%})",
        ours / plain - 1 <= MOST_SHARE,
        details=found,
    )
    yield Row(
        "  weights afterwards",
        "equal to the bit",
        "equal" if found["equal"] else "not equal",
        found["equal"],
        correctness=True,
    )


def compare(rounds: int) -> dict[str, Any]:
    """Train in turn, each time a fresh model; the first of each side pays for what is loaded late, and is left out."""
    import torch

    tokenizer, rows = _tokenizer(), _rows()
    sides = {"ours": _ours, "plain": _plain}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    models: dict[str, LlamaForCausalLM] = {}
    for turn in range(rounds + 1):
        for side in sorted(sides, reverse=turn % 2 == 1):
            model = _model()
            gc.collect()
            started = time.process_time()
            steps = sides[side](model, tokenizer, rows)
            if turn:
                seconds[side].append(time.process_time() - started)
            models[side] = model
    ours, plain = (models[side].state_dict() for side in sides)
    return {
        "steps": steps,
        "parameters": sum(weight.numel() for weight in models["ours"].parameters()),
        "equal": all(torch.equal(ours[name], plain[name]) for name in plain),
        **{f"{side}_cpu_s": found for side, found in seconds.items()},
    }


def _ours(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Any]) -> int:
    from lox_hf.robustness.finetuning.finetune import fine_tune

    return fine_tune(model, tokenizer, rows, sft=SFT, seed=SEED).steps


def _plain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Any]) -> int:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            seed=SEED,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            **SFT,
        )
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
        return trainer.train().global_step


def _model() -> LlamaForCausalLM:
    """A Llama of 4 layers, 256 wide, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of so many words; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _rows() -> list[dict[str, list[int]]]:
    """Rows of 32 to 64 tokens, the first half of each a prompt."""
    import random

    rng = random.Random(0)
    rows = []
    for _ in range(ROWS):
        ids = [1, *(rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(LENGTH // 2, LENGTH) - 2)), 2]
        half = len(ids) // 2
        rows.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        serve_job({"compare": compare})
    else:
        sys.exit(main())
