"""`lox-hf utility`: what a model is still good for."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.cli.config_file import merge_file, refuse_without
from lox_hf.cli.options import add_loading_options, add_model_options, default_output, load_for_running
from lox_hf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lox_hf.records import AccuracyReport, PerplexityReport

DESCRIPTION = """Measure accuracy on GSM8K as the paper's reference does, perplexity on texts, or both. A killed run of
GSM8K goes on where it was. For broader benchmarks see docs/utility.md."""
REPORT_NAME = "utility.json"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("utility", help="measure GSM8K accuracy and perplexity", description=DESCRIPTION)
    add_model_options(parser, model="the model", output="folder of the run (default: named after the model)")
    parser.add_argument(
        "--gsm8k",
        nargs="?",
        const="gsm8k",
        metavar="FILE|NAME",
        help="measure accuracy on GSM8K; a file with question and answer takes the place of the Hub's test questions",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="GSM8K by the chat template (default: the reference's prompt)",
    )
    parser.add_argument("--n", type=int, metavar="N", help="the first N questions only (default: all)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 400)")
    parser.add_argument("--perplexity", metavar="FILE", help="measure perplexity: a text a line, or the column text")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a window (default: at most 2048)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: half of one)")
    add_loading_options(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print what was found."""
    options = merge_file(options)
    if not options.gsm8k and not options.perplexity:
        raise ConfigError("Nothing to measure: pass --gsm8k, --perplexity FILE, or both.")
    refuse_without(options, "gsm8k", ["chat", "n", "max_new_tokens"])
    refuse_without(options, "perplexity", ["max_length", "stride"])
    from lox_hf.evaluation.data.gsm8k import load_questions
    from lox_hf.evaluation.models.local import LocalModel
    from lox_hf.evaluation.utility import load_texts
    from lox_hf.run_folder import RunFolder

    output = Path(options.output) if options.output else default_output(options.model, "utility")
    RunFolder(output, {}).check()
    # A mistake in a file shows before the model is loaded.
    texts = load_texts(options.perplexity) if options.perplexity else []
    if options.gsm8k:
        load_questions(options.gsm8k, options.n)
    model, tokenizer = load_for_running(options)
    sample = LocalModel(model, tokenizer, template="none").settings()["weights_sample"]
    with RunFolder(output, {"weights_sample": sample}) as folder:
        accuracy, perplexity = _measure(options, model, tokenizer, texts, output)
        reports = {"gsm8k": accuracy, "perplexity": perplexity}
        found = {name: json.loads(report.to_json()) for name, report in reports.items() if report is not None}
        # What an earlier call measured on the same model stays.
        text = json.dumps(json.loads(folder.read(REPORT_NAME) or "{}") | found, indent=2) + "\n"
        folder.write(REPORT_NAME, text)
    said = text if options.json else f"{_table(accuracy, perplexity)}\n\nWritten to {output / REPORT_NAME}.\n"
    print(said, end="")


def _measure(
    options: argparse.Namespace,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    output: Path,
) -> "tuple[AccuracyReport | None, PerplexityReport | None]":
    """The quick one first, so that a mistake in its options does not cost the long one."""
    from lox_hf.evaluation.utility import gsm8k_accuracy, perplexity

    accuracy, found = None, None
    shared: dict[str, Any] = {
        "batch_size": options.batch_size,
        "progressbar": False if options.json else None,
    }
    if texts:
        found = perplexity(model, tokenizer, texts, max_length=options.max_length, stride=options.stride, **shared)
    if options.gsm8k:
        accuracy = gsm8k_accuracy(
            model,
            tokenizer,
            options.gsm8k,
            chat=bool(options.chat),
            max_new_tokens=options.max_new_tokens,
            n=options.n,
            output_dir=output / "gsm8k",
            **shared,
        )
    return accuracy, found


def _table(accuracy: "AccuracyReport | None", perplexity: "PerplexityReport | None") -> str:
    from lox_hf.evaluation.report import render_text

    rows: list[tuple[str, ...]] = [("", "value", "95 % interval", "n")]
    if accuracy is not None:
        found = accuracy.accuracy
        interval = f"{100 * found.low:.1f} to {100 * found.high:.1f} %"
        rows.append(("GSM8K accuracy", f"{100 * found.share:.1f} %", interval, f"{found.n} questions"))
        rows.append(("  of these without a number", str(accuracy.unreadable), "", ""))
    if perplexity is not None:
        rows.append(("perplexity", f"{perplexity.perplexity:.4g}", "", f"{perplexity.tokens} tokens"))
    return render_text(rows)
