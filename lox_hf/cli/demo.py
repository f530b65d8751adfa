"""`lox-hf demo`: the demonstration, its tables, and what to type next."""

import argparse
import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lox_hf.cli.words import parse_seeds, parse_words

if TYPE_CHECKING:
    from lox_hf.demo import DemoReport
    from lox_hf.records import Rate

OUTPUT = "lox-demo"
DESCRIPTION = """Train small pairs of models on an invented world (base, then aligned), harden them on disk, in memory
and as an adapter, attack them by fine-tuning with and without LoX, and say what came out. Under five minutes on two
cores; nothing is downloaded. The pairs are kept and used again, and a killed run goes on where it was."""
WIDTH = 110
COLUMNS = ("refuses forbidden", "answers forbidden", "benign right", "benign refused")
ATTACKS = "pairs-100, pairs-10, benign, instructions, identity, sums, default or all"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `demo` command."""
    parser = commands.add_parser(
        "demo", help="train small pairs, harden and attack them, show what happens", description=DESCRIPTION
    )
    add = parser.add_argument
    add("--output", metavar="DIR", default=OUTPUT, help="where everything goes (default: %(default)s)")
    add("--seeds", nargs="+", metavar="N", help="how many, or the seeds themselves: 12,13,14 (default: 3)")
    add("--attacks", nargs="+", metavar="NAME", help=f"{ATTACKS} (default: default)")
    add("--controls", nargs="+", metavar="NAME", help="those of lox-hf stress, all or none (default: random)")
    add("--cache", metavar="DIR", help="where the trained pairs are kept (default: the output folder)")
    add("--json", action="store_true", help="print the record as JSON and nothing else")
    parser.set_defaults(func=run, interrupted="what was done is kept: the same command goes on")


def run(options: argparse.Namespace) -> int:
    """Tell the story and print its record; the exit code is 1 where the three ways do not agree."""
    lists = ("attacks", "controls")
    given: dict[str, Any] = {name: parse_words(words) for name in lists if (words := getattr(options, name))}
    if options.seeds:
        given["seeds"] = parse_seeds(options.seeds)
    from lox_hf.demo import tell_story
    from lox_hf.robustness.variants import CONTROLS

    named = {"all": CONTROLS, "none": ()}
    if len(words := given.get("controls", ())) == 1 and words[0] in named:
        given["controls"] = named[words[0]]
    shown = False if options.json else None
    report = tell_story(options.output, cache_dir=options.cache, progressbar=shown, **given)
    print(report.to_json() if options.json else render(report), end="")
    return 0 if all(agreement.within for agreement in report.agreements) else 1


def render(report: "DemoReport") -> str:
    """Return the report as text: before any attack, agreement, next commands, the attacks, and what came out."""
    from lox_hf.robustness.report.render import render_screen

    parts = ("\n".join(part) for part in (_table(report), _agreement(report), _next(report)))
    caveat = textwrap.fill(report.caveat, WIDTH)
    return "\n\n".join([*parts, caveat, f"THE ATTACKS\n\n{render_screen(report.stress)}"]) + "\n"


def _table(report: "DemoReport") -> list[str]:
    scores = report.results[0].scores
    lines = [
        f"BEFORE ANY ATTACK, seed {report.seed}: greedy answers to {scores.refusals.n} forbidden and "
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
    folder, stress = Path(report.folder), Path(report.stress_dir)
    names = ("aligned", "base", "my-hardened", "my-adapter")
    aligned, base, output, adapter = (shlex.quote(_short(folder / name)) for name in names)
    return [
        f"This run took {report.seconds:.0f} s. To look at: {_short(stress / 'report.html')}.",
        "The checkpoints of this seed, each loadable by AutoModelForCausalLM.from_pretrained:",
        *(f"  {_short(Path(result.folder))}" for result in report.results),
        "Next, harden the pair yourself, write the hardening as a PEFT adapter, or measure a model on the questions:",
        f"  lox-hf harden {aligned} --base-model {base} --output {output} --r 2 --alpha 0.25",
        f"  lox-hf adapter {aligned} --base-model {base} --output {adapter} --r 2 --alpha 0.5",
        f"  lox-hf asr {aligned} --prompts {shlex.quote(_short(Path(report.questions)))} --max-new-tokens 16",
    ]


def _short(path: Path) -> str:
    """Return the path as seen from the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
