"""float8 checkpoints: read with their scales, hardened in float32, rounded once to the blocks' own grids."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from lox_hf import LoxConfig, NumericsError, UnsupportedModelError, harden_checkpoint, plan_hardening
from lox_hf.core.scaled import Blocks, round_rows
from lox_hf.weights.scaled import ScaledSource, coarse_steps, with_scales
from lox_hf.weights.source import CheckpointSource
from test_faults import results
from test_many_processes import start
from zoo import read_checkpoint, save_pair

E4M3 = torch.float8_e4m3fn
BLOCK = 16
"""Divides every side of the zoo's "llama", as transformers wants it."""

Tensors = dict[str, Tensor]


def quantise(tensors: Tensors) -> Tensors:
    """Quantise the linear layers with transformers' own code; embedding, head and norms stay as they are."""
    operation = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(BLOCK,) * 2)))
    return {
        key: value
        for name, tensor in tensors.items()
        for key, value in (operation.convert({name: tensor}) if "proj" in name else {name: tensor}).items()
    }


def write(folder: Path, tensors: Tensors, scheme: dict[str, Any] | None, like: Path, shards: int = 1) -> Path:
    """Write a checkpoint of these tensors with the side files of another."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": scheme} if scheme else {})))
    names = sorted(tensors)
    files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for number, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[number::shards]}, folder / file)
    if shards > 1:
        weight_map = {name: files[number % shards] for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the bfloat16 pair."""
    folder = tmp_path_factory.mktemp("plain")
    save_pair("llama", folder, max_shard_size="10MB")
    return folder


@pytest.fixture(scope="module")
def pair(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the same pair in FineGrainedFP8."""
    folder = tmp_path_factory.mktemp("float8")
    for side in ("aligned", "base"):
        write(folder / side, quantise(read_checkpoint(plain / side)), FP8, plain / side)
    return folder


def spread(scale: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Scales by entry, in float64."""
    rows, columns = weight.shape
    whole = scale.double().reshape(-(-rows // block[0]), -1)
    return whole.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def meaning(
    tensors: Tensors, name: str, block: tuple[int, int] = (BLOCK, BLOCK), ending: str = "_scale_inv"
) -> Tensor:
    """What a stored weight stands for, in float64."""
    weight = tensors[name].double()
    return weight * spread(tensors[name + ending], weight, block) if name + ending in tensors else weight


def hardened(ours: Tensor, theirs: Tensor, r: int, alpha: float) -> Tensor:
    """The paper's equation in float64."""
    u, s, vh = torch.linalg.svd(ours - theirs, full_matrices=False)
    return ours + alpha * (u[:, :r] * s[:r]) @ vh[:r]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_rounded(found: Tensor, scale: Tensor, expected: Tensor) -> None:
    """The stored numbers are the nearest to `expected` on their grid.

    The decomposition's tolerance of 1e-4 of a change that may be as large as the weight, against steps of 1/16 of it,
    lets about 1e-4 / (1/16) of them fall on the other side of a midpoint, and none further.
    """
    nearest = (expected / scale).clamp(-448, 448).float().to(E4M3)
    differing = bits(nearest) != bits(found)
    assert differing.double().mean() <= 1.6e-3
    steps = bits(nearest)[differing].int() - bits(found)[differing].int()
    assert (steps.abs() <= 1).all()


def test_blocks_are_hardened_and_rounded_once(pair: Path, tmp_path: Path) -> None:
    report = harden_checkpoint(pair / "aligned", tmp_path / "out", LoxConfig(str(pair / "base"), r=4, alpha=1.25))
    aligned, base, out = (read_checkpoint(folder) for folder in (pair / "aligned", pair / "base", tmp_path / "out"))
    weights = [name for name in aligned if name + "_scale_inv" in aligned]
    assert {one.name for one in report.tensors} == {
        name for name, tensor in aligned.items() if tensor.dim() == 2 and "_scale" not in name
    }
    assert {one.dtype for one in report.tensors if one.name in weights} == {"float8_e4m3fn"}
    kept = raised = 0
    for name in weights:
        expected = hardened(meaning(aligned, name), meaning(base, name), 4, 1.25)
        before, after = (side[name + "_scale_inv"] for side in (aligned, out))
        same = before == after
        largest = expected.abs().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).amax((1, 3))
        assert (largest[same] <= before[same] * 464 * (1 + 1e-5)).all()
        assert (largest[~same] >= before[~same] * 464 * (1 - 1e-5)).all()
        torch.testing.assert_close(after[~same].double(), largest[~same] / 448, rtol=1e-4, atol=0)
        assert_rounded(out[name], spread(after, expected, (BLOCK, BLOCK)), expected)
        kept, raised = kept + int(same.sum()), raised + int((~same).sum())
    assert kept and raised  # control: both happen
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # bfloat16 beside float8
        expected = hardened(aligned[name].double(), base[name].double(), 4, 1.25).to(torch.bfloat16)
        assert (out[name] != expected).double().mean() < 1e-3


def test_transformers_loads_the_result(pair: Path, tmp_path: Path) -> None:
    harden_checkpoint(pair / "aligned", tmp_path / "out", LoxConfig(str(pair / "base"), r=4, alpha=1.25))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    out, loaded = read_checkpoint(tmp_path / "out"), model.state_dict()
    for name in (name for name in out if name + "_scale_inv" in out):
        torch.testing.assert_close(loaded[name].double(), meaning(out, name), rtol=1e-6, atol=0)


def test_numbers_that_do_not_change_keep_their_bits(pair: Path, tmp_path: Path) -> None:
    """Alignment made one row smaller, and nothing else: so does LoX, which needs no larger scale for it."""
    aligned = read_checkpoint(pair / "aligned")
    name = "model.layers.0.mlp.up_proj.weight"
    base = aligned | {name: aligned[name].clone()}
    base[name][5] = (base[name][5].float() * 1.5).to(E4M3)
    folder = write(tmp_path / "base", base, FP8, pair / "base")
    report = harden_checkpoint(pair / "aligned", tmp_path / "out", LoxConfig(str(folder), r=1, alpha=0.5))
    assert [one.name for one in report.tensors if one.method != "zero"] == [name]
    out = read_checkpoint(tmp_path / "out")
    assert all(bits(out[other]).equal(bits(aligned[other])) for other in aligned if other != name)
    changed = bits(out[name]) != bits(aligned[name])
    assert changed.any(1).nonzero().flatten().tolist() == [5]


def test_base_in_full_precision(pair: Path, plain: Path, tmp_path: Path) -> None:
    """Either side may be the one with scales: names of scales are missing on the other."""
    name = "model.layers.1.self_attn.q_proj.weight"
    quantised, full = read_checkpoint(pair / "aligned"), read_checkpoint(plain / "base")
    harden_checkpoint(pair / "aligned", tmp_path / "out", LoxConfig(str(plain / "base"), r=4))
    out = read_checkpoint(tmp_path / "out")
    expected = hardened(meaning(quantised, name), full[name].double(), 4, 1.25)
    assert_rounded(out[name], spread(out[name + "_scale_inv"], expected, (BLOCK, BLOCK)), expected)

    full, quantised = read_checkpoint(plain / "aligned"), read_checkpoint(pair / "base")
    harden_checkpoint(plain / "aligned", tmp_path / "other", LoxConfig(str(pair / "base"), r=4))
    expected = hardened(full[name].double(), meaning(quantised, name), 4, 1.25).to(torch.bfloat16)
    assert (read_checkpoint(tmp_path / "other")[name] != expected).double().mean() < 1e-3


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}},
}


@pytest.mark.parametrize(
    ("block", "ending", "scheme"),
    [
        pytest.param((1, 10**6), "_scale", COMPRESSED, id="channels"),
        pytest.param((10**6, 10**6), "_scale", COMPRESSED, id="tensors"),
        pytest.param((40, 56), "_scale_inv", FP8 | {"weight_block_size": [40, 56]}, id="blocks that do not divide"),
        pytest.param((40, 56), "_scale_inv", FP8 | {"weight_block_size": [40, 56], "scale_fmt": "ue8m0"}, id="powers"),
    ],
)
def test_layouts(block: tuple[int, int], ending: str, scheme: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    powers = scheme.get("scale_fmt") == "ue8m0"
    sides = {}
    for side in ("aligned", "base"):
        sides[side] = tensors = {}
        for name, tensor in read_checkpoint(plain / side).items():
            tensors[name] = tensor
            if "proj" in name:
                blocks = Blocks(*_fit(block, tensor), powers_of_two=powers)
                wanted = blocks.raised(blocks.largest(tensor.float()) / 448)
                tensors[name], tensors[name + ending] = round_rows(tensor.float(), wanted, E4M3, blocks)
                tensors[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
        write(tmp_path / side, tensors, scheme, plain / side)
    harden_checkpoint(tmp_path / "aligned", tmp_path / "out", LoxConfig(str(tmp_path / "base"), r=3, alpha=8.0))
    out = read_checkpoint(tmp_path / "out")
    changed = 0
    for name in (name for name in out if out[name].dtype == E4M3):
        ours, theirs = (meaning(sides[side], name, _fit(block, out[name]), ending) for side in ("aligned", "base"))
        expected = hardened(ours, theirs, 3, 8.0)
        scale = spread(out[name + ending], expected, _fit(block, out[name]))
        assert_rounded(out[name], scale, expected)
        assert not powers or out[name + ending].log2().frac().eq(0).all()
        changed += not out[name + ending].equal(sides["aligned"][name + ending])
    assert changed  # control: scales were raised
    assert any(name.endswith("input_scale") for name in out)


def _fit(block: tuple[int, int], weight: Tensor) -> tuple[int, int]:
    return min(block[0], weight.shape[0]), min(block[1], weight.shape[1])


def test_plan_says_what_becomes_of_scales(pair: Path, plain: Path) -> None:
    plan = plan_hardening(pair / "aligned", LoxConfig(str(plain / "base")))
    reasons = {tensor.name: tensor.reason for tensor in plan.tensors if not tensor.edit}
    name = "model.layers.0.mlp.up_proj.weight"
    assert reasons[name + "_scale_inv"] == f"scale of {name}"
    stored = sum(file.stat().st_size for file in (pair / "aligned").glob("*.safetensors"))
    assert 0 < stored - plan.total_bytes < 10_000  # the header


def test_scales_in_another_file(pair: Path, tmp_path: Path) -> None:
    """The weight is hardened all the same; one file at a time is refused."""
    aligned = write(tmp_path / "aligned", read_checkpoint(pair / "aligned"), FP8, pair / "aligned", shards=2)
    config = LoxConfig(str(pair / "base"), r=4)
    harden_checkpoint(aligned, tmp_path / "out", config)
    harden_checkpoint(pair / "aligned", tmp_path / "whole", config)
    ours, whole = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "whole")
    assert all(bits(ours[name]).equal(bits(whole[name])) for name in whole)
    source = with_scales(CheckpointSource(aligned, "aligned"), aligned)
    with pytest.raises(UnsupportedModelError, match="have their scales in another"):
        source.within(source.shards[:1])
    assert isinstance(source.within(source.shards), ScaledSource)  # control


@pytest.mark.distributed
def test_scales_in_another_process_s_share(pair: Path, tmp_path: Path) -> None:
    """A weight and its scales lie in two files, one of which the other process may be at work on."""
    (tmp_path / "pair").mkdir()
    for side in ("aligned", "base"):
        write(tmp_path / "pair" / side, read_checkpoint(pair / side), FP8, pair / side, shards=2)
    harden_checkpoint(tmp_path / "pair" / "aligned", tmp_path / "alone", LoxConfig(str(tmp_path / "pair" / "base")))
    processes = start("plain", tmp_path / "pair", tmp_path / "together")
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert results(tmp_path / "together") == results(tmp_path / "alone")
    before, after = (read_checkpoint(folder) for folder in (tmp_path / "pair" / "aligned", tmp_path / "alone"))
    assert any(not after[name].equal(before[name]) for name in before if name.endswith("_scale_inv"))  # control


def save(folder: Path, tensors: Tensors, scheme: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint without a model."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": scheme} if scheme else {}))
    return folder


def draw(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
def test_float8_without_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    base, aligned = draw(80, 72).to(dtype), (draw(80, 72) + draw(80, 1, seed=1) @ draw(1, 72, seed=2)).to(dtype)
    save(tmp_path / "base", {"a.weight": base})
    save(tmp_path / "aligned", {"a.weight": aligned})
    report = harden_checkpoint(tmp_path / "aligned", tmp_path / "out", LoxConfig(str(tmp_path / "base"), r=2))
    out = read_checkpoint(tmp_path / "out")["a.weight"]
    assert (out.dtype, report.tensors[0].dtype) == (dtype, str(dtype).removeprefix("torch."))
    expected = hardened(aligned.double(), base.double(), 2, 1.25).float().to(dtype)
    assert (bits(out) != bits(expected)).double().mean() < 1e-3

    with pytest.raises(NumericsError, match=r"a\.weight: the result overflows float8"):
        harden_checkpoint(
            tmp_path / "aligned", tmp_path / "far", LoxConfig(str(tmp_path / "base"), r=2, alpha=1e5)
        )
    assert not (tmp_path / "far").exists()


def test_stacks_of_experts(tmp_path: Path) -> None:
    """Each expert is a matrix of its own, and has a grid of its own; rows of blocks lie across tiles and buffers."""
    blocks, sides = Blocks(48, 40), {}
    signal = torch.stack([draw(100, 1, seed=seed) @ draw(1, 88, seed=seed + 9) for seed in range(3)])
    for side, weight in (("base", draw(3, 100, 88)), ("aligned", draw(3, 100, 88) + 0.5 * signal)):
        stored = [round_rows(one.clone(), blocks.largest(one) / 448, E4M3, blocks) for one in weight]
        codes, scales = (torch.stack(each) for each in zip(*stored, strict=True))
        sides[side] = {"mlp.experts.gate_up_proj": codes, "mlp.experts.gate_up_proj_scale_inv": scales}
        save(tmp_path / side, sides[side], FP8 | {"weight_block_size": [48, 40]})
    report = harden_checkpoint(tmp_path / "aligned", tmp_path / "out", LoxConfig(str(tmp_path / "base"), r=1))
    assert [one.name for one in report.tensors] == [f"mlp.experts.gate_up_proj[{number}]" for number in range(3)]
    out = read_checkpoint(tmp_path / "out")
    for number in range(3):
        each = {side: {name: tensor[number] for name, tensor in tensors.items()} for side, tensors in sides.items()}
        ours, theirs = (meaning(each[side], "mlp.experts.gate_up_proj", (48, 40)) for side in ("aligned", "base"))
        expected = hardened(ours, theirs, 1, 1.25)
        scale = spread(out["mlp.experts.gate_up_proj_scale_inv"][number], expected, (48, 40))
        assert_rounded(out["mlp.experts.gate_up_proj"][number], scale, expected)


def test_users_are_warned_of_coarse_steps(pair: Path, plain: Path) -> None:
    words = coarse_steps(plan_hardening(pair / "aligned", LoxConfig(str(pair / "base"))).tensors)
    assert "14 weights are stored as float8" in words[0]
    assert coarse_steps(plan_hardening(plain / "aligned", LoxConfig(str(plain / "base"))).tensors) == ()
