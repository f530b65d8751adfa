"""A stress test as one HTML page: no scripts, nothing from elsewhere, for phones, paper, light and dark."""

import re
from collections.abc import Callable, Iterable, Mapping
from html import escape as escape_html

from lox_hf.errors import ConfigError
from lox_hf.plots.style import INK, svg_text
from lox_hf.records import StressReport
from lox_hf.robustness.findings.wording import role
from lox_hf.robustness.plots import PICTURES, Picture, describe, of_attack, outcomes_by_attack
from lox_hf.robustness.report.tables import Cell, Section, Table, sections

# No page can load or run anything under it, whatever a name tries.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --quiet: #63636b; --line: #d9d9de; --paper: #ffffff; --card: #f4f5f7;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ec; --quiet: #a5a5ae; --line: #3a3a42; --paper: #16171b; --card: #202127; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, ul { margin: .4rem 0; max-width: 46rem; }
.quiet, caption, .seeds, .detail { color: var(--quiet); }
.cards, .figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.cards section { background: var(--card); border-left: .25rem solid var(--mark); padding: .5rem 1rem; }
.cards h2 { font-size: 1rem; border: 0; margin: 0; padding: 0; }
.cards li:nth-child(n+3) { font-size: .875rem; color: var(--quiet); }
ul { padding-left: 1.1rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  min-width: 6rem; max-width: 26rem; }
thead th { vertical-align: bottom; }
th:first-child { min-width: 9rem; }
tbody th { font-weight: 400; }
tr.hardened th { font-weight: 600; }
tr.control { color: var(--quiet); }
.seeds, .detail { display: block; font-size: .75rem; }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  figure, tr, .cards section { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  h2, h3, h2 + p { break-after: avoid; }
  th, td, th:first-child { min-width: 0; padding: .2rem .3rem; }
}
"""


def render_page(report: StressReport) -> str:
    """Render a report as one HTML page that needs nothing else; all text from models and files is escaped.

    Args:
        report: The report.

    Returns:
        The page: the headline, the figures, the tables. Where a figure cannot be drawn a sentence says why.
    """
    title = f"Stress test of {report.aligned.name_or_path}"
    attacks = outcomes_by_attack(report)
    seeds = ", ".join(map(str, report.seeds))
    about = f"Base model: {report.base.name_or_path}. Attacks: {', '.join(attacks)}. Seeds: {seeds}."
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">{_text(about)}</p>',
        _headline(report.findings),
        *(_pictures(picture, report, attacks) for picture in PICTURES),
        *map(_section, sections(report)),
    ]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>"
    )
    parts = ("<!DOCTYPE html>", '<html lang="en">', f"<head>\n{head}\n</head>", "<body>", "<main>", *body)
    return "\n".join([*parts, "</main>", "</body>", "</html>\n"])


def _headline(findings: Mapping[str, Iterable[str]]) -> str:
    """What came out, a card per attack."""
    shown = (
        f"<section>\n<h2>{_text(attack or 'Over all attacks')}</h2>\n{_list(lines, _text)}\n</section>"
        for attack, lines in findings.items()
        if lines
    )
    return '<div class="cards">\n' + "\n".join(shown) + "\n</div>"


def _pictures(picture: Picture, report: StressReport, attacks: Iterable[str]) -> str:
    """One kind of figure, for every attack, or why it is not drawn."""
    drawn, missing = [], {}
    for number, attack in enumerate(attacks):
        part = of_attack(report, attack)
        try:
            svg = svg_text(picture.draw(part))
        except ConfigError as problem:
            missing[str(problem)] = None
            continue
        drawn.append(f"<figure>\n{_inline(svg, describe(picture, part), f'{picture.name}-{number}')}\n</figure>")
    parts = [f"<h2>{_text(picture.title)}</h2>"]
    if drawn:
        parts += [f"<p>{_text(picture.reading(report))}</p>", '<div class="figures">', *drawn, "</div>"]
    return "\n".join([*parts, *(f"<p>{_text(problem)}</p>" for problem in missing)])


def _inline(svg: str, label: str, name: str) -> str:
    """An SVG file's picture as a part of the page: its own ids, the page's ink, no background."""

    def adapt(tag: re.Match[str]) -> str:
        own = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0])
        return own.replace(INK, "currentColor").replace("fill: #ffffff", "fill: none")

    picture = svg[svg.index("<svg") :]
    # Its style sheet would hold for the whole page; the page's own says the same.
    picture = re.sub(r"<style.*?</style>", "", picture, flags=re.DOTALL)
    # Outside tags there is text only, in which every "<" stands as an entity.
    picture = re.sub(r"<[^<>]*>", adapt, picture)
    return picture.replace("<svg ", f'<svg role="img" aria-label="{_text(label)}" ', 1).strip()


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>"]
    parts += [_list(section.lines, _typeset)] * bool(section.lines)
    return "\n".join([*parts, '<div class="tables">', *map(_table, section.tables), "</div>"])


def _table(table: Table) -> str:
    caption = f"<caption>{_text(table.note)}</caption>\n" if table.note else ""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.header)
    rows = "\n".join(_row(row) for row in table.rows)
    title = f"<h3>{_text(table.title)}</h3>\n" if table.title else ""
    return (
        f'<div class="scroll">\n{title}<table>\n{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        "</table>\n</div>"
    )


def _row(row: tuple[Cell, ...]) -> str:
    name, *figures = row
    cells = "".join(f"<td>{_cell(cell, _typeset)}</td>" for cell in figures)
    return f'<tr class="{role(name.text)}"><th scope="row">{_cell(name, _text)}</th>{cells}</tr>'


def _cell(cell: Cell, show: Callable[[str], str]) -> str:
    parts = [show(cell.text)]
    if cell.seeds:
        parts.append(f'<span class="seeds">{", ".join(map(show, cell.seeds))}</span>')
    if cell.detail:
        parts.append(f'<span class="detail">{_text(cell.detail)}</span>')
    return "".join(parts)


def _list(lines: Iterable[str], show: Callable[[str], str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{show(line)}</li>" for line in lines) + "\n</ul>"


def _typeset(text: str) -> str:
    """Text with the signs of print."""
    shown = _text(text).replace(" +- ", "&nbsp;&plusmn;&nbsp;")
    shown = shown.replace("&gt;=: ", "&ge;: ").replace("&lt;=: ", "&le;: ")
    return shown.replace("&gt;= ", "&ge;&nbsp;").replace("&lt;= ", "&le;&nbsp;")


def _text(text: str) -> str:
    """Text in which nothing is markup; characters that are not printable are taken out."""
    return escape_html("".join(character for character in " ".join(text.split()) if character.isprintable()))
