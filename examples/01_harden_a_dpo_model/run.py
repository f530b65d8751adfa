"""Align a small Llama by DPO, harden it by the command line, load it back, and say what can be said of it.

python examples/01_harden_a_dpo_model/run.py --data pairs.jsonl.gz
python examples/01_harden_a_dpo_model/run.py --model ALIGNED --base-model BASE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import torch
from common.commands import Timer, run_command
from preferences import Preference, hold_out, load_preferences
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import training
from lox_hf import HardeningReport

BETA = 0.1
PROMPTS = ("What should I cook for dinner tonight?", "Can you help me plan a birthday party?")


def main(arguments: list[str] | None = None) -> None:
    """Run the example.

    Args:
        arguments: Command line; None takes the process's own.
    """
    options = parse(arguments)
    # TRL still sets the option by the name that transformers is leaving behind.
    warnings.filterwarnings("ignore", message=".*Use `(is_)?activation_checkpointing`", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        trained_here = options.model is None
        held_out: list[Preference] = []
        if trained_here:
            held_out = make_pair(folder, options)
        elif options.data:
            held_out = load_preferences(options.data)[: options.held_out]
        aligned, base = options.model or str(folder / "aligned"), options.base_model or str(folder / "base")
        command = ("harden", aligned, "--base-model", base, "--output", folder / "hardened")
        report = HardeningReport.from_dict(run_command(*command, "--r", options.r, "--alpha", options.alpha))
        tokenizer = AutoTokenizer.from_pretrained(aligned)
        names = {"base": base, "aligned": aligned, "hardened": str(folder / "hardened")}
        # bfloat16 products would add an error of their own to the small model's likelihoods.
        dtype = torch.float32 if trained_here else "auto"
        scores = compare(names, tokenizer, measure.keep_short(held_out, tokenizer, options.max_tokens), dtype)
        show_report(report, options.r)
        if held_out:
            show_table(scores)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="HH-RLHF pairs, .jsonl or .jsonl.gz; else they come from the Hub")
    parser.add_argument("--model", help="harden this aligned model (Hub id or folder) instead of training one")
    parser.add_argument("--base-model", help="the model before alignment, with --model")
    parser.add_argument("--output", type=Path, help="keep the checkpoints in this new folder")
    parser.add_argument("--r", type=int, default=6, help="directions to extrapolate, the paper's k (default 6)")
    parser.add_argument("--alpha", type=float, default=1.25, help="strength (default 1.25)")
    parser.add_argument("--held-out", type=int, default=600, help="pairs to keep apart and measure on (default 600)")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest dialogue, in tokens (default 160)")
    parser.add_argument("--base-steps", type=int, default=120, help="steps of the language model (default 120)")
    parser.add_argument("--dpo-steps", type=int, default=50, help="steps of DPO (default 50)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of DPO (default 5e-4)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.base_model is None):
        parser.error("--model and --base-model belong together")
    return options


def make_pair(folder: Path, options: argparse.Namespace) -> list[Preference]:
    """Train base and aligned, save both as sharded checkpoints, and return the held-out pairs."""
    pairs, held_out = hold_out(load_preferences(options.data), options.held_out, options.seed)
    texts = [pair.prompt + pair.chosen for pair in pairs]
    tokenizer = training.train_tokenizer(texts)
    with Timer(f"base: a small Llama, {options.base_steps} steps on {len(texts)} dialogues"):
        base = training.train_base(tokenizer, texts, steps=options.base_steps, seed=options.seed)
        training.save(base, tokenizer, folder / "base")
    short = measure.keep_short(pairs, tokenizer, options.max_tokens)
    with Timer(f"aligned: DPO, {options.dpo_steps} steps of 8 out of {len(short)} pairs"):
        training.align(
            folder / "base",
            short,
            folder / "aligned",
            steps=options.dpo_steps,
            learning_rate=options.learning_rate,
            seed=options.seed,
        )
    for name in ("base", "aligned"):
        print(f"saved {name}: {len(list((folder / name).glob('*.safetensors')))} safetensors files")
    return held_out


def compare(
    names: dict[str, str], tokenizer: PreTrainedTokenizerBase, pairs: list[Preference], dtype: torch.dtype | str
) -> dict[str, torch.Tensor]:
    """Load each model in turn, let it answer, and take its likelihoods on the pairs."""
    scores = {}
    for name, path in names.items():
        model = training.load(path, dtype)
        for prompt in PROMPTS:
            print(f"{name:>9}: {prompt} -> {answer(model, tokenizer, prompt)!r}")
        scores[name] = measure.answer_log_likelihoods(model, tokenizer, pairs)
    return scores


def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Generate a few tokens, greedily."""
    inputs = tokenizer(f"\n\nHuman: {prompt}\n\nAssistant:", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def show_report(report: HardeningReport, r: int) -> None:
    """Say how much of the alignment the extrapolated directions hold."""
    unchanged = sum(tensor.rank == 0 for tensor in report.tensors)
    shares = sorted(tensor.energy_share for tensor in report.tensors if tensor.rank)
    print(f"\n{len(report.tensors)} matrices, {unchanged} of them not changed by the alignment")
    if shares:
        print(
            f"energy share of the top {r} directions of dW: median {shares[len(shares) // 2]:.2f}, "
            f"from {shares[0]:.2f} to {shares[-1]:.2f}"
        )


def show_table(scores: dict[str, torch.Tensor]) -> None:
    """Print what the held-out pairs say, with their numbers and intervals."""
    print("\nheld-out pairs, share with 95 % Wilson interval")
    print(f"{'':>9} | {'log p(chosen) > log p(rejected)':<33} | {'implicit reward prefers chosen':<33} | DPO loss")
    rewards = {name: score - scores["base"] for name, score in scores.items()}
    for name, score in scores.items():
        likelier = str(measure.share_of(measure.prefers_chosen(score)))
        # The reward of the base is zero by definition: there is nothing to prefer.
        preferred = "" if name == "base" else str(measure.share_of(measure.prefers_chosen(rewards[name])))
        print(f"{name:>9} | {likelier:<33} | {preferred:<33} | {measure.dpo_loss(rewards[name], BETA):.3f}")
    before, after = (measure.prefers_chosen(rewards[name]) for name in ("aligned", "hardened"))
    won, lost, p_value = measure.mcnemar(before, after)
    print(f"implicit reward, aligned to hardened: {won} pairs won, {lost} lost (exact McNemar p = {p_value:.2g})")
    print("These figures show what the weights do on such pairs. They measure neither safety nor attacks on it.")


if __name__ == "__main__":
    main()
