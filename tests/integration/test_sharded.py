"""Models in pieces over processes are hardened as by one process: FSDP2, meshes, tensor parallelism, ZeRO-3."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_worker import CONFIGS, Q_PROJ, SHAPES, make_pair, pair_of, same
from torch import Tensor
from transformers import AutoModelForCausalLM

from lox_hf import SafetySubspace, apply_lox, hardening_report, revert_lox

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("sharded_worker.py")
OF_THE_CHANGE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
"""Sums of other parts in another order: float32's rounding; in bfloat16 it may turn how an entry is rounded."""
OTHER_ENTRIES = 2.5e-4
"""Share of bfloat16 entries that may be rounded to the neighbour, as the reference's are."""


def launch(scene: str, folder: Path, processes: int) -> list[dict[str, Any]]:
    """Run a scene on several processes; return what each saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    paths = f"{WORKER.parents[2]}{os.pathsep}{WORKER.parents[1]}"
    done = subprocess.run(
        [*command, str(WORKER), scene, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def by_one_process(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process, which holds the whole model, makes of the same pair."""
    model = AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype="auto")
    seen = {}
    for label, config in CONFIGS.items():
        apply_lox(model, config, base_model=folder / "base")
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.ndim == 2}
        seen[label] = {"whole": weights, "report": hardening_report(model)}
        revert_lox(model)
    seen["aligned"] = {"whole": {name: weight.detach() for name, weight in model.named_parameters()}}
    return seen


def check_hardened(found: dict[str, Any], alone: dict[str, dict[str, Any]]) -> None:
    """Every weight is the single process's within the tolerance, every report says the same, and it is undone."""
    for label in CONFIGS:
        wanted, got = alone[label]["whole"], found[label]["whole"]
        assert wanted.keys() == got.keys()
        for name, weight in wanted.items():
            change = (weight.float() - alone["aligned"]["whole"][name].float()).norm()
            assert change > 0
            distance = (got[name].float() - weight.float()).norm() / change
            assert distance < OF_THE_CHANGE[weight.dtype], (label, name)
        if weight.dtype == torch.bfloat16:
            other = sum(int((got[name] != weight).sum()) for name, weight in wanted.items())
            assert other <= OTHER_ENTRIES * sum(map(Tensor.numel, wanted.values())), label
        for report in alone[label]["report"].tensors:
            rank, method, share, norm = found[label]["tensors"][report.name]
            assert (rank, method) == (report.rank, report.method), (label, report.name)
            assert share == pytest.approx(report.energy_share, rel=1e-4)
            assert norm == pytest.approx(report.delta_norm, rel=1e-4)
        assert found[label]["stamped"]
        assert found[label]["changed"]
        assert found[label]["reverted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp2(dtype: torch.dtype, tmp_path: Path) -> None:
    make_pair(tmp_path, dtype)
    one, other = launch("fsdp", tmp_path, processes=2)
    check_hardened(one, by_one_process(tmp_path))
    assert all(same(one[label]["whole"], other[label]["whole"]) for label in CONFIGS)
    assert all(other[label]["reverted"] for label in CONFIGS)
    assert torch.equal(one["after a pass"], 1.5 * torch.arange(30.0).view(5, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_3_before_and_after_the_engine(dtype: torch.dtype, tmp_path: Path) -> None:
    make_pair(tmp_path, dtype)
    one, other = launch("zero", tmp_path, processes=2)
    alone = by_one_process(tmp_path)
    for seen in (one, one["engine"]):
        check_hardened(seen, alone)
    for label in CONFIGS:
        assert same(one[label]["whole"], other[label]["whole"])
        assert other[label]["reverted"] and other["engine"][label]["reverted"]
    assert one["masters"] > 0  # there was a copy of the optimiser's to edit
    for seen in (one, other):
        assert seen["kept by a step"]  # which an edit of the weights alone is not
        assert seen["in use"] and seen["whole between uses"] > 0
        assert seen["offloaded"].startswith("UnsupportedModelError: DeepSpeed offloads the optimiser")
        assert (seen["added"].float() - 1).abs().max() < 0.01  # bfloat16 rounds


def test_tensor_parallelism_and_meshes(tmp_path: Path) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}
    make_pair(tmp_path, torch.float32, **sizes, intermediate_size=136)  # transformers' plans want even pieces
    everyone = launch("meshes", tmp_path, processes=4)
    alone = by_one_process(tmp_path)
    kinds = {label: seen["kinds"] for label, seen in everyone[0].items()}
    assert kinds == {
        "tp": {"(Shard(dim=0),)", "(Shard(dim=1),)"},
        "fsdp x tp": {"(Shard(dim=0), Shard(dim=1))", "(_StridedShard(dim=0, sf=2), Shard(dim=0))"},
        "hsdp": {"(Replicate(), Shard(dim=0))"},
    }
    for label in kinds:
        for seen in everyone:
            check_hardened(seen[label], alone)


def test_directions_are_found_and_used_in_pieces(tmp_path: Path) -> None:
    make_pair(tmp_path, torch.float32)
    one, other = launch("subspace", tmp_path, processes=2)
    alone = SafetySubspace.from_models(tmp_path / "aligned", tmp_path / "base", CONFIGS["rank"])
    assert alone.factors.keys() == one["factors"].keys()
    hardened = by_one_process(tmp_path)
    for name, wanted in alone.factors.items():
        u, s, vh = one["factors"][name]
        assert ((u * s) @ vh - wanted.dense()).norm() < 1e-5 * wanted.dense().norm()
        turned = (u.T @ wanted.U).double()  # the same directions, each up to its sign
        there = turned @ alone.base_coordinates[name] @ (vh @ wanted.Vh.T).double().T
        assert (one["coordinates"][name] - there).norm() < 1e-4 * there.norm()
        change = (hardened["rank"]["whole"][name] - hardened["aligned"]["whole"][name]).norm()
        assert (one["whole"][name] - hardened["rank"]["whole"][name]).norm() < 1e-5 * change
        assert all(map(torch.equal, one["factors"][name], other["factors"][name]))


def test_what_one_process_alone_finds_is_said_by_all_and_nothing_is_changed(tmp_path: Path) -> None:
    make_pair(tmp_path, torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    other.save_pretrained(tmp_path / "other")
    seen = launch("faults", tmp_path, processes=2)
    alone = by_one_process(tmp_path)
    starts = {
        "no base": "CheckpointError: There is no folder",
        "spread base": "UnsupportedModelError: base",
        "spread state": "UnsupportedModelError: The state dict that is given as base is spread over processes.",
        "other settings": "DistributedError: The processes that hold aligned",
        "other base": "DistributedError: The processes that hold aligned",
        "experts": "UnsupportedModelError: FSDPMixtralForCausalLM is spread over processes and holds 2 weights",
        "not hardened": "LoxError: FSDPLlamaForCausalLM was not hardened",
        "changed since": "LoxError: The weights were changed",
    }
    for rank in seen:
        assert {name: rank[name][: len(start)] for name, start in starts.items()} == starts
        for label in ("rank", "full", "exact"):
            assert rank[f"nan {label}"] == f"NumericsError: {Q_PROJ}: dW contains NaN or Inf."
            assert rank[f"nan {label} put back"]
        check_hardened(rank["partly"], alone)


def test_a_process_that_is_lost_is_an_error_and_no_wait(tmp_path: Path) -> None:
    make_pair(tmp_path, torch.float32)
    left, _ = launch("lost", tmp_path, processes=2)
    assert left["said"].startswith("DistributedError: A process that works with this one does not answer")
    assert left["edits"] == 5
    assert left["put back"]
    assert left["seconds"] < 60


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("pieces", tmp_path_factory.mktemp("pieces"), processes=4)


def test_pieces_of_every_placement_have_the_directions_of_the_whole(pieces: list[dict[str, Any]]) -> None:
    assert len(pieces[0]) == len(SHAPES) * 15
    wrong = []
    for shape in SHAPES:
        base, whole = pair_of(shape)
        u, s, vh = torch.linalg.svd((whole - base).double(), full_matrices=False)
        k = min(3, *shape)
        change = (u[:, :k] * s[:k]) @ vh[:k]
        for label in [label for label in pieces[0] if label.startswith(f"{shape} ")]:
            found = pieces[0][label]
            left, values, right = (part.double() for part in found["factors"])
            good = (left * values @ right - change).norm() < 1e-4 * change.norm()
            edited = whole.double() + 0.5 * left @ right
            good &= (found["dense"] - edited).norm() < 1e-6 * edited.norm()
            good &= (found["before"] - left.T @ whole.double() @ right.T).norm() < 1e-5 * whole.norm()
            good &= (found["after"] - found["before"] - 0.5 * torch.eye(k)).norm() < 1e-5 * whole.norm()
            wrong += [] if good else [label]
    assert wrong == []


def test_pieces_are_the_same_on_every_process_and_no_row_is_read_twice(pieces: list[dict[str, Any]]) -> None:
    for label, found in pieces[0].items():
        for seen in pieces[1:]:
            assert all(map(torch.equal, seen[label]["factors"], found["factors"])), label
            assert torch.equal(seen[label]["dense"], found["dense"]), label
        if "Replicate" not in label:
            rows, columns = found["dense"].shape
            assert sum(seen[label]["rows"] for seen in pieces) == rows, label
            assert sum(seen[label]["held"] for seen in pieces) == rows * columns, label


def test_pieces_cover_both_ways_of_decomposing(pieces: list[dict[str, Any]]) -> None:
    assert {found["method"] for found in pieces[0].values()} == {"lanczos", "exact"}
    assert any(0 in [seen[label]["held"] for seen in pieces] for label in pieces[0])  # a process without a piece


def test_a_nan_in_one_piece_is_refused_on_every_process(pieces: list[dict[str, Any]]) -> None:
    said = {text for seen in pieces for found in seen.values() for text in found["bad"]}
    assert said == {"NumericsError: dW contains NaN or Inf", "NumericsError: W contains NaN or Inf"}
