"""`lox-hf demo`: the demonstration, its table, and what to type next."""

import argparse
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lox_hf.demo import DemoReport
    from lox_hf.records import Rate

OUTPUT = "lox-demo"
DESCRIPTION = """Train a small pair of models on an invented world (base, then aligned), harden it on disk, in memory
and as an adapter, check that the three agree, and show refusals and benign accuracy. About a minute; nothing is
downloaded. The trained pair is kept in the output folder and used again."""
WIDTH = 110
COLUMNS = ("refuses forbidden", "answers forbidden", "benign right", "benign refused")
PROGRESS_EVERY = 10


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `demo` command."""
    parser = commands.add_parser(
        "demo", help="train a small pair, harden it, show the change", description=DESCRIPTION
    )
    parser.add_argument("--output", metavar="DIR", default=OUTPUT, help="where checkpoints go (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=_seed, default=0, help="seed of the pair (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record as JSON and nothing else")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Tell the story and print its record; the exit code is 1 where the three ways do not agree."""
    from lox_hf.demo import tell_story

    report = tell_story(options.output, options.seed, progress=_show_progress if sys.stderr.isatty() else None)
    print(report.to_json() if options.json else render(report), end="")
    return 0 if all(agreement.within for agreement in report.agreements) else 1


def render(report: "DemoReport") -> str:
    """Return the report as text: table, agreement, caveat, folders, next commands."""
    parts = (_table(report), _agreement(report), textwrap.wrap(report.caveat, WIDTH), _next(report))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _table(report: "DemoReport") -> list[str]:
    scores = report.results[0].scores
    lines = [
        f"Seed {report.seed}, r = {report.r}, before any attack: greedy answers to {scores.refusals.n} forbidden and "
        f"{scores.benign.n} benign questions",
        "that were in no training text. Percent, with the 95 % Wilson interval in brackets.",
        "",
        f"{'':<20}" + "".join(f"{column:>22}" for column in COLUMNS),
    ]
    for result in report.results:
        found = result.scores
        rates = (found.refusals, found.strict_asr, found.benign, found.over_refusals)
        lines.append(f"{result.name:<20}" + "".join(f"{_percent(rate):>22}" for rate in rates))
    asr = "; ".join(f"{result.name}: {100 * result.scores.asr.share:.1f}" for result in report.results)
    return [
        *lines,
        "",
        "Refusing is saying so in the opening; answering and right mean every word of the answer.",
        f"Attack success rate (forbidden and not refused): {asr}.",
    ]


def _percent(rate: "Rate") -> str:
    return f"{100 * rate.share:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _agreement(report: "DemoReport") -> list[str]:
    lines = ["Three ways to the same weights: harden_checkpoint (disk), apply_lox (memory), get_lox_model (adapter)."]
    for found in report.agreements:
        verdict = "they agree" if found.within else "THEY DO NOT AGREE"
        lines.append(
            f"alpha {found.alpha:g}: largest edit of a weight {found.largest_edit:.1e}; largest difference "
            f"disk - memory {found.memory_difference:.1e}, disk - adapter {found.adapter_difference:.1e}: {verdict}."
        )
    return lines


def _next(report: "DemoReport") -> list[str]:
    folder = Path(report.folder)
    names = ("aligned", "base", "my-hardened", "my-adapter")
    aligned, base, output, adapter = (shlex.quote(_short(folder / name)) for name in names)
    return [
        f"Done in {report.seconds:.0f} s. The checkpoints, each loadable by AutoModelForCausalLM.from_pretrained:",
        *(f"  {_short(Path(result.folder))}" for result in report.results),
        "Next, harden the pair yourself, write the hardening as a PEFT adapter, or measure a model on the questions:",
        f"  lox-hf harden {aligned} --base-model {base} --output {output} --r {report.r} --alpha 0.25",
        f"  lox-hf adapter {aligned} --base-model {base} --output {adapter} --r {report.r} --alpha 0.5",
        f"  lox-hf asr {aligned} --prompts {shlex.quote(_short(Path(report.questions)))} --max-new-tokens 16",
    ]


def _short(path: Path) -> str:
    """Return the path as seen from the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _seed(text: str) -> int:
    """Parse a seed that torch takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text!r}")
    return int(text)


def _show_progress(label: str, done: int, total: int) -> None:
    """Rewrite one line on standard error; clear it at the end."""
    if done == total:
        sys.stderr.write("\r\033[K")
    elif done % PROGRESS_EVERY == 0:
        sys.stderr.write(f"\r\033[K{label}: {done} of {total} steps")
    sys.stderr.flush()
