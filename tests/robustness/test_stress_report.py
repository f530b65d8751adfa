"""What a person reads of a stress test: the headline first, every seed, everything escaped, nothing from elsewhere."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lox_hf.errors import OutputError
from lox_hf.records import AttackOutcome, Spread, StressReport
from lox_hf.robustness.report.render import render_markdown, render_page, render_screen, save_report
from lox_hf.robustness.report.tables import Cell, before_table, figure, safety_table, sections, share
from lox_hf.run_folder import RunFolder
from robustness.reports import report_of, run, runs

SMALL = ("aligned", "hardened r=2 alpha=1.0", "random r=2 alpha=1.0")
ATTACKS = ("gsm8k", "alpaca")
EVIL = '</td><script>alert(1)</script><img src="https://example.org/x" onerror=alert(1)> [a](javascript:x) | \x1b[31m'
VOID = {"meta", "path", "use", "rect", "br", "img"}


@cache
def small_report(
    models: tuple[str, ...] = SMALL, attacks: tuple[str, ...] = ATTACKS, **settings: bool
) -> StressReport:
    return report_of(runs(models, attacks, (0, 1, 2), **settings))


@cache
def small_page() -> str:
    return render_page(small_report())


class Page(HTMLParser):
    """A page as a reader's browser sees it: its elements, whether they close, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID or self.open[-1:] == ["svg"]:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, own, value in self.attributes if own == name]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def outcome_of(report: StressReport, model: str, attack: str) -> AttackOutcome:
    return next(own for own in report.outcomes if (own.model, own.attack) == (model, attack))


def test_a_figure_shows_every_seed_and_its_bounds() -> None:
    assert figure(Spread((8.0, 20.0), 14.0, 8.5, 2, ("", ">="))) == Cell(">= 14 +- 8", ("8", ">= 20"))
    mixed = Spread((-9.0, 9.0), 0.0, 12.7, 2, ("<=", ">="))
    assert figure(mixed, sign="+") == Cell("+0 +- 13", ("<= -9", ">= +9"))
    assert share(Spread((0.5, float("nan")), 0.5, float("nan"), 1)) == Cell("50", ("50", "-"))
    assert share(Spread((float("nan"),) * 2)) == Cell("-")
    assert share(Spread((0.25,), 0.25, float("nan"), 1)) == Cell("25")
    assert figure(Spread((-0.04, 0.3), 0.13, 0.24, 2), digits=1, sign="+").seeds == ("+0.0", "+0.3")


def test_the_screen_ends_with_the_headline() -> None:
    lines = ("It held out longer.", "No gain on seed 2 " + "and so on " * 20 + ".")
    report = replace(small_report(), findings={"": lines})
    lines = render_screen(report).split("\n")
    assert max(map(len, lines)) <= 110
    tail = lines[lines.index("It held out longer.") :]
    assert " ".join(tail) == " ".join(" ".join(report.headline).split())


def test_the_screen_has_a_table_per_attack_with_every_seeds_half_life() -> None:
    report = small_report()
    screen = render_screen(report)
    for attack in ATTACKS:
        table = screen.split(f"Attack: {attack}\n")[1].split("\n\n")[0].splitlines()
        assert [line.split("  ")[0] for line in table[1:]] == list(SMALL)
        seeds = " ".join(f"{value:.1f}" for value in outcome_of(report, SMALL[1], attack).half_life.values)
        assert seeds in table[2]
    assert "Worst case over the attacks" in screen and "safeinst: no safety examples were given" in screen
    assert "Worst case" not in render_screen(small_report(attacks=("gsm8k",)))


@pytest.mark.parametrize("render", [render_markdown, render_page], ids=["markdown", "page"])
def test_the_parts_come_in_the_order_of_a_reader(render) -> None:
    report = replace(small_report(), findings={"": ("Nothing of the gain is left.",)}, limits=("A limit.",))
    page = Page(render(report)).words
    order = [
        *("Nothing of the gain is left.", "Attack: gsm8k", "Attack: alpaca", "Models before any attack"),
        *("what it would mean", "Learning rates scanned", "Worst case over the attacks", "What the attack taught"),
        "retention afterwards",
        *("safeinst: no safety examples were given", "A limit.", "Settings and versions", "0123abc", "1.4.0"),
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places)


def test_the_page_shows_the_figures_between_headline_and_tables() -> None:
    report = replace(small_report(), findings={"gsm8k": ("It held out longer.",), "": ("Few seeds.",)})
    page = render_page(report)
    found = Page(page)
    assert found.open == [] and found.tags["svg"] == 4 * len(ATTACKS) and found.tags["script"] == 0
    assert page.index("It held out longer.") < page.index("<svg") and page.rindex("<svg") < page.index("How to read")
    assert "Few seeds." in found.words and "Over all attacks" in found.words
    labels = [value for value in found.values("aria-label") if value]
    half = outcome_of(report, "aligned", "gsm8k").half_life.mean
    assert len(labels) == found.tags["svg"] and f"aligned 50 % after {half:.1f} steps" in labels[0]


def test_every_seed_is_on_the_page() -> None:
    report = small_report()
    for page in (Page(small_page()).words, render_markdown(report)):
        for outcome in report.outcomes:
            for cell in (figure(outcome.half_life, digits=1), share(outcome.mean_asr), share(outcome.final_asr)):
                assert ", ".join(cell.seeds) in page


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = small_page()
    found = Page(page)
    links = [value for name in ("href", "xlink:href", "src", "srcset") for value in found.values(name)]
    assert links and all(link.startswith("#") for link in links)
    assert set(re.findall(r"url\((.)", page)) <= {"#"} and "@import" not in page and found.tags["link"] == 0
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and "@media print" in page
    assert 'name="viewport"' in page
    # What is named for a drawing is there, once: the ids of several drawings do not collide.
    ids = Counter(found.values("id"))
    named = {link[1:] for link in links} | set(re.findall(r"url\(#([^)]*)", page))
    assert max(ids.values()) == 1 and named <= set(ids)


def test_drawings_take_the_pages_ink_and_paper() -> None:
    page = small_page()
    drawing = page[page.index("<svg") : page.index("</svg>")]
    assert "currentColor" in drawing and "#1b1b1f" not in drawing and "fill: #ffffff" not in drawing
    assert "<style" not in drawing and "<metadata" not in drawing and "<?xml" not in page


def test_two_pages_are_byte_equal_and_survive_json() -> None:
    report = small_report()
    again = StressReport.from_json(report.to_json())
    assert render_page(again) == small_page()
    for render in (render_markdown, render_screen):
        assert render(report) == render(again)
    assert render_screen(small_report(attacks=("gsm8k",))) != render_screen(report)


def test_what_is_in_a_report_stays_text() -> None:
    cells = runs(("aligned", f"hardened {EVIL}", EVIL), (EVIL, "b"), (0, 1))
    base = report_of(cells)
    texts = {"findings": {EVIL: (EVIL,), "": (EVIL,)}, "limits": (EVIL,), "not_run": (EVIL,)}
    named = {"aligned": replace(base.aligned, name_or_path=EVIL), "base": replace(base.base, revision=EVIL)}
    report = replace(base, **texts, **named, settings={**base.settings, EVIL: {EVIL: EVIL}}, versions={EVIL: EVIL})
    found = Page(render_page(report))
    assert found.open == [] and found.tags["script"] == found.tags["img"] == 0
    assert not any(name.startswith("on") for _, name, _ in found.attributes) and "\x1b" not in found.words
    assert "<script>alert(1)</script>" in found.words  # it is shown, as text
    markdown = render_markdown(report)
    assert "<script" not in markdown and "<img" not in markdown and not re.search(r"(?<!\\)\]\(", markdown)
    assert "\x1b" not in markdown and "\x1b" not in render_screen(report)


def test_markdown_tables_are_whole() -> None:
    page = render_markdown(small_report())
    blocks = re.findall(r"(?:^\|.*\n?)+", page, re.MULTILINE)
    assert len(blocks) >= 8
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_a_figure_that_cannot_be_drawn_is_a_sentence() -> None:
    page = render_page(small_report(benign=False, utility=False))
    found = Page(page)
    assert found.tags["svg"] == 2 * len(ATTACKS)
    assert found.words.count("no harmless prompts were asked") == found.words.count("utility was not measured") == 1


def test_without_matplotlib_the_page_has_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = Page(render_page(small_report()))
    assert found.tags["svg"] == 0 and "pip install 'lox-hf[plot]'" in found.words and found.tags["table"] > 5


def test_columns_of_which_nothing_is_known_are_left_out() -> None:
    titles = {section.title: section for section in sections(small_report(utility=False))}
    (before,) = titles["Models before any attack"].tables
    assert before.header == ("model", "ASR (%)", "benign refusal (%)")
    (known,) = {section.title: section for section in sections(small_report())}["Models before any attack"].tables
    assert known.header[-1] == "utility (%)"


def test_perplexity_is_told_by_what_was_measured() -> None:
    report = small_report()
    before = tuple(replace(own, utility=Spread((0.9,), 0.9, float("nan"), 1)) for own in report.before)
    told = replace(report, before=before, settings={**report.settings, "utility": "perplexity"})
    assert before_table(told).header[-1] == "perplexity" and before_table(told).rows[0][-1].text == "0.9"
    assert before_table(replace(report, before=before)).header[-1] == "utility (%)"


def test_strict_and_degenerate_have_columns_where_they_tell() -> None:
    names = ("strict ASR at the end (%)", "degenerate at the end (%)")
    report = small_report()
    plain = safety_table(report, "gsm8k")
    assert not set(names) & set(plain.header)
    known = tuple(
        replace(own, final_strict_asr=Spread((0.25,), 0.25, n=1), final_degenerate=Spread((0.5,), 0.5, n=1))
        for own in report.outcomes
    )
    table = safety_table(replace(report, outcomes=known), "gsm8k")
    assert table.header[-2:] == names and [cell.text for cell in table.rows[0][-2:]] == ["25", "50"]
    zero = tuple(replace(own, final_degenerate=Spread((0.0,), 0.0, n=1)) for own in known)
    assert safety_table(replace(report, outcomes=zero), "gsm8k").header[-1] == names[0]


def test_the_aligned_models_own_row_shows_the_budget() -> None:
    report = small_report()
    row = safety_table(report, "gsm8k").rows[0]
    assert row[4].text == f"step {outcome_of(report, 'aligned', 'gsm8k').matched_steps.mean:.1f}"


def test_mcnemar_is_shown_per_seed() -> None:
    report = small_report()
    (attack,) = [own for own in sections(report) if own.title == "Attack: gsm8k"]
    shown = attack.tables[1].rows[0][-1].text.split(", ")
    assert len(shown) == 3 and all(float(p) < 0.05 for p in shown)


def test_a_collapse_is_said_beside_the_name() -> None:
    cells = [run(model, seed=seed, utility=0.2 if model != "aligned" else 0.9) for model in SMALL for seed in (7, 8)]
    report = report_of(cells)
    said = "utility collapsed on seeds 7 and 8: no defence, not counted"
    assert f"{SMALL[1]} ({said})" in render_screen(report)
    assert said in Page(render_page(report)).words and said in render_markdown(report)
    assert "collapsed" not in render_screen(small_report())


def test_every_control_is_explained() -> None:
    models = ("aligned", "hardened r=2 alpha=1.0", "refusal-matched r=2 alpha=1.0", "safeinst", "something else")
    report = small_report(models)
    (controls,) = {section.title: section for section in sections(report)}["Controls"].tables
    assert [row[0].text for row in controls.rows] == list(models[2:])
    assert "extra refusal" in controls.rows[0][1].text and controls.rows[2][1].text == ""


def test_controls_are_grey_and_the_hardened_ones_stand_out() -> None:
    page = small_page()
    for model, role in zip(SMALL, ("aligned", "hardened", "control"), strict=True):
        assert f'<tr class="{role}"><th scope="row">{model}</th>' in page


def test_a_report_on_disk(tmp_path: Path) -> None:
    report = small_report(attacks=("gsm8k",))
    with RunFolder(tmp_path / "stress", {"run": "test"}) as folder:
        save_report(report, folder)
    root = tmp_path / "stress"
    assert StressReport.from_json((root / "results.json").read_text()).to_json() == report.to_json()
    assert json.loads((root / "results.json").read_text())["seeds"] == [0, 1, 2]
    assert (root / "report.html").read_text() == render_page(report)
    markdown = (root / "report.md").read_text()
    pictures = re.findall(r"^!\[.*\]\((figures/[^)]*\.png)\)$", markdown, re.MULTILINE)
    assert len(pictures) == 4 and all((root / picture).exists() for picture in pictures)
    assert all((root / picture).with_suffix(".svg").exists() for picture in pictures)


def test_a_report_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "stress", {"run": "test"}) as folder:
        (tmp_path / "stress" / "figures").write_text("in the way")
        with pytest.raises(OutputError, match="figures"):
            save_report(small_report(attacks=("gsm8k",)), folder)
    save_report(small_report(attacks=("gsm8k",)), RunFolder(None, {}))
    assert not (tmp_path / "stress" / "report.html").exists()
