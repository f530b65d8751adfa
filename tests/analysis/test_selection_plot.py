"""The figure of a selection: every candidate is a point, and what a reader needs to judge it is drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.test_recommend import attacked, candidate, score, selection
from lox_hf.analysis.recommend import recommend
from lox_hf.errors import ConfigError
from lox_hf.plots.selection import draw_selection, save_selection_plot
from lox_hf.plots.style import svg_text
from lox_hf.records import Candidate, Score, Selection


def grid(with_attack: bool) -> Selection:
    """Two kinds at two alphas, of which the stronger ones refuse too much."""
    items: list[Candidate] = []
    for number, r in enumerate((2, None)):
        for alpha in (0.5, 1.0):
            after = attacked(200 - 100 * number, 0.5 - 0.1 * number) if with_attack and alpha == 0.5 else None
            found = score(refused=int(40 * (alpha - 0.5)) * 2, kl=0.01 * alpha)
            items.append(candidate(found, alpha * (1 + number), after, r=r, alpha=alpha))
    return recommend(selection(*items, after=attacked(360, 0.7) if with_attack else None))


def markers(axes: Any) -> list[tuple[float, float, bool]]:
    """The points of candidates: where each is, and whether it is hollow."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() == "white")
        for line in axes.lines
        if line.get_marker() in ("o", "s") and len(line.get_xdata()) == 1 and line.get_markersize() == 5
    ]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for own in figure.legends for text in own.get_texts()]


def test_costs_over_strength() -> None:
    figure = draw_selection(grid(False))
    first, second = figure.axes
    assert first.get_ylabel() == "harmless prompts refused (%)" and "KL" in second.get_ylabel()
    assert markers(first) == [(0.5, 0, False), (1.0, 10, True), (1.0, 0, False), (2.0, 10, True)]
    (limit,) = [line for line in first.lines if line.get_xdata()[0] == 0 and line.get_ydata()[0] == pytest.approx(5)]
    assert limit.get_ydata()[1] == pytest.approx(5)
    bars = [list(line.get_ydata()) for line in first.lines if list(line.get_xdata()) == [2.0, 2.0]]
    low, high = (100 * end for end in grid(False).candidates[-1].score.interval("over_refusal"))
    assert bars == [[pytest.approx(low), pytest.approx(high)]]
    said = legend(figure)
    assert said[:3] == ["all", "r = 2", "full rank"] and "breaks a limit (hollow)" in said
    assert any(text.startswith("recommended: r=full alpha=0.5") for text in said)


def test_what_an_attack_tells_has_a_panel() -> None:
    found = grid(True)
    gain = draw_selection(found).axes[-1]
    assert gain.get_ylabel() == "mean ASR along the attack (%)" and "KL" in gain.get_xlabel()
    assert markers(gain) == [(0.005, 50, False), (0.005, 40, False)]
    assert [text.get_text() for text in gain.texts] == ["0.5", "0.5"]
    (ring,) = [line for line in gain.lines if line.get_markersize() == 13]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (0.005, 40)


def test_nothing_to_recommend_and_nothing_to_draw() -> None:
    none = recommend(selection(candidate(score(refused=80))))
    assert not any(text.startswith("recommended") for text in legend(draw_selection(none)))
    unknown = replace(none, aligned_score=Score.of({"own": 1.0}))
    with pytest.raises(ConfigError, match="nothing was measured that has a limit"):
        draw_selection(unknown)


def test_the_same_record_gives_the_same_files(tmp_path: Path) -> None:
    found = grid(True)
    read = Selection.from_json(found.to_json())
    assert svg_text(draw_selection(found)) == svg_text(draw_selection(read))
    assert [path.name for path in save_selection_plot(found, tmp_path / "new" / "selection")] == [
        "selection.png",
        "selection.svg",
    ]
