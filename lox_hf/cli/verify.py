"""`lox-hf verify`: is a published model what it says?"""

import argparse
from typing import TYPE_CHECKING

from lox_hf.cli.config_file import merge_file
from lox_hf.markdown import one_line

if TYPE_CHECKING:
    from lox_hf.records import TensorCheck, VerificationReport

SHOWN = 20


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "verify",
        help="check that a published model is what it says",
        description="Recompute the weights of a hardened model from the two models that its stamp names, tensor by "
        "tensor in constant memory, and compare them bit by bit. Exits 1 with the tensors that differ.",
    )
    parser.add_argument("model_position", nargs="?", metavar="MODEL", help="the hardened model: folder or Hub id")
    parser.add_argument("--model", metavar="MODEL", help="the same, as an option")
    parser.add_argument("--model-revision", metavar="REV", help="revision of the hardened model on the Hub")
    parser.add_argument("--aligned", metavar="MODEL", help="where the aligned model lies, if not where it says")
    parser.add_argument("--base", metavar="MODEL", help="where the base lies, if not where it says")
    parser.add_argument(
        "--exact", action="store_true", default=None, help="take differences by another machine's rounding as wrong"
    )
    parser.add_argument("--work-dir", metavar="DIR", help="folder for the tensors in work (default: TMPDIR)")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options; the command line wins")
    parser.add_argument("--json", action="store_true", default=None, help="print the record as JSON and nothing else")
    parser.set_defaults(func=run, interrupted="nothing was changed")


def run(options: argparse.Namespace) -> int:
    """Verify, and print what was found."""
    options = merge_file(options)
    from lox_hf.hub.verify import verify

    report = verify(
        options.model,
        aligned=options.aligned,
        base=options.base,
        revision=options.model_revision,
        exact=bool(options.exact),
        work_dir=options.work_dir,
        progressbar=False if options.json else None,
    )
    print(report.to_json() if options.json else summary(report), end="" if options.json else "\n")
    return 0 if report.verified else 1


def summary(report: "VerificationReport") -> str:
    """The report in a few lines: what was compared, what is wrong, and the verdict."""
    edited = sum(check.edited for check in report.tensors)
    equal = len(report.tensors) - len(report.rounded) - len(report.wrong)
    base = _named(report.base.name_or_path, report.base.revision) if report.base else "not known"
    lines = [
        f"model    {_named(report.model.name_or_path, report.model.revision)}",
        f"aligned  {_named(report.aligned.name_or_path, report.aligned.revision)}",
        f"base     {base}",
        f"r        {'full rank' if report.config['r'] is None else report.config['r']}",
        f"alpha    {report.config['alpha']}",
        "",
        f"{len(report.tensors)} compared, {edited} of them edited by LoX: {equal} equal bit for bit, "
        f"{len(report.rounded)} but for rounding, {len(report.wrong)} different.",
    ]
    lines += [f"Rounding: {_line(check)}" for check in report.rounded[:SHOWN]] + _more(report.rounded)
    lines += [f"Different: {_line(check)}" for check in report.wrong[:SHOWN]] + _more(report.wrong)
    lines += [f"Contradiction: {one_line(text)}" for text in report.problems]
    lines.append("Verified: the weights are what the model says." if report.verified else "NOT verified.")
    return "\n".join(lines)


def _line(check: "TensorCheck") -> str:
    name = one_line(check.name)
    if check.detail:
        return f"{name}: {check.detail}"
    if not check.edited:
        return f"{name}: {check.differing} of {check.entries} numbers are not those of the aligned model"
    return (
        f"{name}: {check.differing} of {check.entries} numbers, by up to {check.largest_ulps:.3g} ulps, "
        f"{check.relative_error:.2g} of the change"
    )


def _more(checks: "tuple[TensorCheck, ...]") -> list[str]:
    return [f"... and {len(checks) - SHOWN} more"] if len(checks) > SHOWN else []


def _named(name: str, revision: str | None) -> str:
    return one_line(f"{name} at {revision}" if revision else name)
