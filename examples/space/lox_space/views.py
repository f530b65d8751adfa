"""Plans and reports as HTML; every text that comes from a model, a file or a user is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from lox_hf.records import HardeningReport, TensorPlan
from lox_space.jobs import Planned

PROMISE = (
    "LoX raises the cost of losing safety in later fine-tuning. It does not make a model safe, and nothing is "
    "measured here: measure refusals, over-refusal and usefulness before and after."
)


def show_plan(planned: Planned) -> str:
    """The plan: what goes in, what would be edited, what is left as it is.

    Args:
        planned: The plan.

    Returns:
        HTML.
    """
    plan = planned.plan
    edited, copied = plan.edited, [tensor for tensor in plan.tensors if not tensor.edit]
    facts = [
        ("Aligned model", _model(planned.aligned)),
        ("Base model", _model(planned.base)),
        ("Settings", f"{planned.order.r} directions a matrix, strength {planned.order.alpha:g}"),
        ("To edit", f"{len(edited)} tensors, {_parameters(edited)}"),
        ("As they are", f"{len(copied)} tensors"),
        ("To download", _size(planned.download_bytes) if planned.download_bytes else "nothing, both are folders here"),
        ("Result", _size(plan.total_bytes)),
    ]
    rows = [(tensor.name, " x ".join(map(str, tensor.shape)), tensor.dtype, _fate(tensor)) for tensor in plan.tensors]
    table = _details(f"All {len(rows)} tensors", ("Tensor", "Shape", "Stored as", "What happens"), rows)
    return _card("The plan", _facts(facts), _notes([*plan.warnings, *planned.warnings]), table)


def show_progress(share: float) -> str:
    """A bar.

    Args:
        share: What is done, in [0, 1].

    Returns:
        HTML.
    """
    percent = round(100 * share)
    bar = (
        f'<div class="lox-bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100">'
        f'<div style="width:{percent}%"></div></div>'
    )
    return _card("Hardening", f"{bar}<p>{percent} % of what has to be downloaded and written lies on the disk.</p>")


def show_report(report: HardeningReport, warnings: Iterable[str]) -> str:
    """What was done to each matrix, and in total.

    Args:
        report: The report.
        warnings: What the user should know besides.

    Returns:
        HTML.
    """
    changed = [item for item in report.tensors if item.rank]
    facts = [
        ("Hardened", f"{len(changed)} matrices"),
        ("Left as they were", f"{len(report.tensors) - len(changed) + report.copied}"),
        ("Change added again", f"{_percent(report.energy_share)} of what alignment changed, times the strength"),
        ("Time", f"{report.seconds:.1f} s"),
        ("Safety", "not evaluated"),
    ]
    rows = [
        (item.name, str(item.rank), _percent(item.energy_share), f"{item.alpha:g}", item.method)
        for item in report.tensors
    ]
    heads = ("Matrix", "Directions", "Share of the change", "Strength", "How")
    return _card(
        "The report",
        _facts(facts),
        _notes(dict.fromkeys([*report.warnings, *warnings])),
        _details(f"All {len(rows)} matrices", heads, rows),
        f'<p class="lox-quiet">{PROMISE}</p>',
    )


def show_pushed(url: str) -> str:
    """Where the model lies now.

    Args:
        url: URL of the commit.

    Returns:
        HTML.
    """
    text = escape(url)
    link = f'<a href="{text}" rel="noopener" target="_blank">{text}</a>' if url.startswith("http") else text
    return _card("Pushed", f"<p>{link}</p><p>It is removed from this page's machine.</p>")


def show_error(text: str) -> str:
    """A message that says what to do.

    Args:
        text: The message.

    Returns:
        HTML.
    """
    return f'<div class="lox-card lox-error" role="alert"><p>{escape(text)}</p></div>'


def show_busy(text: str) -> str:
    """That something goes on.

    Args:
        text: What.

    Returns:
        HTML.
    """
    return f'<div class="lox-card" role="status"><p class="lox-busy">{escape(text)}</p></div>'


def _card(title: str, *parts: str) -> str:
    return f'<div class="lox-card"><h3>{escape(title)}</h3>{"".join(parts)}</div>'


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts) + "</dl>"


def _notes(texts: Iterable[str]) -> str:
    return "".join(f'<p class="lox-note">{escape(text)}</p>' for text in texts)


def _details(title: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<div class="lox-table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _model(found: dict) -> str:
    return found["name"] + (f" at {found['revision'][:7]}" if found["revision"] else "")


def _fate(tensor: TensorPlan) -> str:
    return f"edited, {tensor.r} directions" if tensor.edit else f"copied: {tensor.reason}"


def _parameters(tensors: Iterable[TensorPlan]) -> str:
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    for unit, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= unit:
            return f"{count / unit:.3g} {name} weights"
    return f"{count} weights"


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _percent(share: float) -> str:
    return "not known" if math.isnan(share) else f"{share:.1%}"
