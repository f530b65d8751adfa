"""The view by layers: shares against float64, places of every architecture's names, and what the figure shows."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from drift_oracle import fine_tune
from lox_hf import LoxConfig, SafetySubspace
from lox_hf.analysis.layers import layer_map, where_most_lies
from lox_hf.errors import ConfigError
from lox_hf.plots.layers import draw_layer_map
from lox_hf.plots.style import svg_text
from lox_hf.records import DriftReading, LayerEntry, LayerMap, LayerSummary, ModelReference, TensorDrift
from lox_hf.training.monitor import read_drift
from lox_hf.weights.selection import layer_place

R = 2
# float32 tiles and an iterative decomposition against float64.
CLOSE = 1e-4
LLAMA_KINDS = {f"self_attn.{one}_proj" for one in "qkvo"} | {f"mlp.{one}_proj" for one in ("gate", "up", "down")}


def map_of(kind: str, folder: Path, **settings: object) -> tuple[LayerMap, zoo.Pair]:
    pair = zoo.save_pair(kind, folder, dtype=torch.float32, max_shard_size="1GB")
    config = LoxConfig(r=R, **settings)  # pyrefly: ignore[bad-argument-type]
    return layer_map(SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, config)), pair


def entry(kind: str, layer: int | None, change: float = 0.1, s: tuple[float, ...] = (2.0, 1.0)) -> LayerEntry:
    return LayerEntry(f"{layer}.{kind}", layer, kind, (4, 4), change, 0.5 if change else math.nan, s)


def made(*entries: LayerEntry, tuned: str = "") -> LayerMap:
    return LayerMap(ModelReference("aligned"), ModelReference("base"), entries, 2, tuned)


def test_the_shares_are_those_of_the_weights(tmp_path: Path) -> None:
    found, pair = map_of("llama", tmp_path)
    aligned, base = pair.aligned(), pair.base()
    changes = {name: aligned[name].double() - base[name].double() for name in aligned if aligned[name].ndim > 1}
    whole = sum(change.square().sum().item() for change in changes.values())
    assert [item.name for item in found.entries] == list(changes)
    for item in found.entries:
        s, energy = torch.linalg.svdvals(changes[item.name]), changes[item.name].square().sum().item()
        assert item.shape == tuple(changes[item.name].shape)
        assert item.change_share == pytest.approx(energy / whole, rel=CLOSE)
        assert item.energy_share == pytest.approx(s[:R].square().sum().item() / energy, rel=CLOSE)
        assert item.singular_values == pytest.approx(s[:R].tolist(), rel=CLOSE)
    assert math.fsum(item.change_share for item in found.entries) == pytest.approx(1)
    attention = {name: change for name, change in changes.items() if "q_proj" in name}
    kept = sum(torch.linalg.svdvals(change)[:R].square().sum().item() for change in attention.values())
    energy = sum(change.square().sum().item() for change in attention.values())
    summary = found.by_kind()["self_attn.q_proj"]
    assert summary.matrices == 2 and summary.energy_share == pytest.approx(kept / energy, rel=CLOSE)
    assert summary.change_share == pytest.approx(energy / whole, rel=CLOSE)


def test_retention_of_another_model_by_kind_and_layer(tmp_path: Path) -> None:
    pair = zoo.save_pair("llama", tmp_path, dtype=torch.float32, max_shard_size="1GB")
    subspace = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LoxConfig(r=R))
    reading = read_drift(fine_tune(pair.aligned(), pair.base()), subspace, target_modules=".*")
    found = layer_map(subspace, reading, "tuned")
    assert found.tuned == "tuned"
    assert [item.retention for item in found.entries] == [drift.retention for drift in reading.tensors]
    # All matrices together are what the reading itself says of the model.
    assert LayerSummary.of(found.entries).retention == pytest.approx(reading.retention, abs=CLOSE)
    assert min(item.retention for item in found.by_kind().values()) < 0.99  # control: it has been moved
    assert {item.retention for item in layer_map(subspace, read_drift(pair.aligned_dir, subspace)).entries} != {1.0}
    some = layer_map(subspace, DriftReading(tensors=(TensorDrift("lm_head.weight", 0.5),)))
    assert some.tuned == "a model in memory" and some.by_kind()["lm_head"].retention == 0.5
    assert math.isnan(some.by_layer()[0].retention)


@pytest.mark.parametrize(
    ("kind", "kinds", "outside"),
    [
        ("llama", LLAMA_KINDS, {"model.embed_tokens", "lm_head"}),
        ("llama_tied", LLAMA_KINDS, {"model.embed_tokens"}),
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, None),
    ],
)
def test_kinds_of_every_architecture(kind: str, kinds: set[str], outside: set[str] | None, tmp_path: Path) -> None:
    found, _ = map_of(kind, tmp_path)
    assert {item.kind for item in found.entries if item.layer is not None} == kinds
    assert list(found.by_layer()) == [0, 1, None]
    beside = {item.kind for item in found.entries if item.layer is None}
    assert outside is None or beside == outside
    assert list(found.by_kind())[-len(beside) :] == [name for name in found.by_kind() if name in beside]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_one_kind_and_stay_apart_in_the_record(kind: str, tmp_path: Path) -> None:
    found, _ = map_of(kind, tmp_path)
    experts = [item for item in found.entries if "experts" in item.kind and len(item.shape) == 2]
    cells = {key: cell for key, cell in found.cells().items() if "experts" in key[0]}
    assert len({item.name for item in experts}) == len(experts) > len(cells)
    assert 4 in {cell.matrices for cell in cells.values()}
    assert all(not part.isdigit() and "[" not in part for kind, _ in cells for part in kind.split("."))


def test_stacks_of_layers_are_not_mixed() -> None:
    names = ["encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q", "decoder.block.1.layer.1.q", "shared"]
    sides = [{f"{name}.weight": torch.randn(8, 8) for name in names} for _ in range(2)]
    found = layer_map(SafetySubspace.from_models(*sides, LoxConfig(r=1)))
    assert {(item.kind, item.layer) for item in found.entries} == {
        ("encoder.block.layer.q", 0),
        ("decoder.block.layer.q", 0),
        ("decoder.block.layer.q", 1),
        ("shared", None),
    }
    named = LoxConfig(r=1, layers_pattern="layer", layers_to_transform=[0])
    found = layer_map(SafetySubspace.from_models(*sides, named))
    assert {item.layer for item in found.entries} == {0} and len(found.entries) == 2


@pytest.mark.parametrize(
    ("module", "pattern", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", None, ("model.layers", 3, "self_attn.q_proj")),
        ("h.3.attn.c_attn", None, ("h", 3, "attn.c_attn")),
        ("model.layers.3.mlp.experts.5.w1", None, ("model.layers", 3, "mlp.experts.5.w1")),
        ("model.layers.3.mlp.experts.5.w1", "experts", ("model.layers.3.mlp.experts", 5, "w1")),
        ("model.h.3.attn", ["blocks", "h|layers"], ("model.h", 3, "attn")),
        ("model.h.3.attn", ["(a)|(h)"], ("model.h", 3, "attn")),
        ("model.h.3.attn", "blocks", None),
        ("lm_head", None, None),
        ("0", None, None),
    ],
)
def test_where_a_module_lies(module: str, pattern: list[str] | str | None, expected: tuple | None) -> None:
    assert layer_place(module, pattern) == expected


def test_what_did_not_change() -> None:
    weights = {name: torch.randn(8, 8) for name in ("model.layers.0.a.weight", "model.layers.1.a.weight")}
    moved = {name: tensor + (0 if "0" in name else 1) for name, tensor in weights.items()}
    found = layer_map(SafetySubspace.from_models(moved, weights, LoxConfig(r=1)))
    still, changed = found.by_layer()[0], found.by_layer()[1]
    assert still.change_share == 0 and math.isnan(still.energy_share) and math.isnan(still.s_1)
    assert changed.change_share == 1 and changed.energy_share == pytest.approx(1)
    assert "half of that in 1 of 2 layers" in where_most_lies(found)
    with pytest.raises(ConfigError, match="changed none of 1 matrices"):
        draw_layer_map(made(entry("q", 0, 0.0, ())))


def test_a_reading_of_something_else_is_refused() -> None:
    subspace = SafetySubspace.from_models({"a": torch.ones(4, 4)}, {"a": torch.zeros(4, 4)}, LoxConfig(r=1))
    for reading, words in ((DriftReading(0.5), "no matrices"), (DriftReading(tensors=(TensorDrift("b", 1),)), "b")):
        with pytest.raises(ConfigError, match=f"holds none of the 1 matrices.*it has {words}"):
            layer_map(subspace, reading)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 9)), min_size=1, max_size=9))
def test_taking_together_in_any_order_and_grouping(rows: list[tuple[float, float, float]]) -> None:
    entries = [
        LayerEntry(str(n), n % 2, "q", (4, 4), change, energy, (s,), energy)
        for n, (change, energy, s) in enumerate(rows)
    ]
    whole = LayerSummary.of(entries)
    assert whole == pytest.approx(LayerSummary.of(reversed(entries)), nan_ok=True)
    parts = list(made(*entries).by_layer().values())
    assert math.fsum(part.change_share for part in parts) == pytest.approx(whole.change_share)
    assert max(part.s_1 for part in parts) == whole.s_1 and sum(part.matrices for part in parts) == len(entries)
    held = math.fsum(part.energy_share * part.change_share for part in parts if part.change_share > 0)
    assert held == pytest.approx(whole.energy_share * whole.change_share if whole.change_share > 0 else 0, abs=1e-12)


def test_the_sentence_names_the_largest_first() -> None:
    kinds = [entry(kind, layer, share) for layer in range(4) for kind, share in (("q", 0.01), ("up", 0.05 * layer))]
    words = where_most_lies(made(entry("lm_head", None, 0.5), entry("embed", None, 0.16), *kinds))
    assert words.startswith("66.0% of the change lies outside the layers: lm_head 50.0%, embed 16.0%.")
    assert "34.0% of the change lies in the layers: up 30.0%, q 4.0%; half of that in 2 of 4 layers." in words


def test_the_record_comes_back(tmp_path: Path) -> None:
    found, _ = map_of("llama", tmp_path)
    text = found.to_json()
    assert LayerMap.from_json(text).to_json() == text
    assert json.loads(text)["entries"][0]["retention"] is None


@pytest.mark.parametrize("layers", [2, 12, 13, 32, 80])
def test_the_figure_has_a_cell_for_every_value(layers: int) -> None:
    kinds = [entry(kind, layer) for layer in range(layers) for kind in ("q", "up") if (kind, layer) != ("up", 1)]
    found = made(entry("lm_head", None), *kinds)
    figure = draw_layer_map(found)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert sum(title.startswith(("Share", "Held", "Largest")) for title in titles) == 3
    assert not any("Retention" in title for title in titles)
    main, side = figure.axes[:2]
    assert main.images[0].get_array().shape == (2, layers) and side.images[0].get_array().shape == (1, 1)
    assert len(main.patches) == 1  # the one that is missing, hatched
    assert len(main.texts) == (2 * layers - 1 if layers <= 12 else 0)
    assert [label.get_text() for label in main.get_yticklabels()] == ["q", "up"]
    assert svg_text(figure) == svg_text(draw_layer_map(LayerMap.from_json(found.to_json())))


def test_retention_has_its_panel_and_its_middle_at_one() -> None:
    moved = [LayerEntry(str(n), n, "q", (4, 4), 0.5, 0.5, (1.0,), 1.5 - n) for n in range(2)]
    figure = draw_layer_map(made(*moved, tuned="tuned"))
    (panel,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("Retention")]
    assert (panel.images[0].norm.vmin, panel.images[0].norm.vmax) == (0.5, 1.5)
    assert [text.get_text() for text in panel.texts] == ["1.50", "0.50"]
    # A single direction does not fall: no panel of it.
    assert not any(axes.get_title(loc="left").startswith("s_i") for axes in figure.axes)
    assert any(axes.get_title(loc="left").startswith("s_i") for axes in draw_layer_map(made(entry("q", 0))).axes)
