"""float8 and other codes that are not read, refused by name before anything is written."""

from pathlib import Path

import pytest
import torch

from lox_hf import LoxConfig, NumericsError, PairingError, UnsupportedModelError, harden_checkpoint, plan_hardening
from test_scaled import COMPRESSED, E4M3, FP8, draw, save

FLOAT8 = draw(32, 32).to(E4M3)
REFUSED = {
    "int8": ({"quant_method": "bitsandbytes"}, {}, r"quantised \(bitsandbytes\)"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, {}, r"quantised \(gptq\)"),
    "fp4 experts": (FP8 | {"expert_dtype": "fp4"}, {}, r"quantised \(fp8 fp4\)"),
    "packed": (COMPRESSED | {"format": "pack-quantized"}, {}, r"quantised \(compressed-tensors pack-quantized\)"),
    "sparse": (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "compressed-tensors"),
    "asymmetric": (
        COMPRESSED | {"config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "symmetric": False}}}},
        {"a.weight_scale": torch.ones(32, 1)},
        r"quantised \(compressed-tensors float-quantized asymmetric\)",
    ),
    "zero points": (
        COMPRESSED,
        {"a.weight_scale": torch.ones(32, 1), "a.weight_zero_point": FLOAT8[:, :1].contiguous()},
        r"^1 float8 .*a\.weight: it has zero points",
    ),
    "no scales": (FP8, {}, r"a\.weight: it has no scales"),
    "bytes as scales": (
        FP8,
        {"a.weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)},
        r"a\.weight: its scales are stored as uint8",
    ),
    "another grid": (
        FP8,
        {"a.weight_scale_inv": torch.ones(3, 2)},
        r"a\.weight: scales of shape \(3, 2\) do not fit the weight's \(32, 32\)",
    ),
    "a row of scales": (
        COMPRESSED,
        {"a.weight_scale": torch.ones(32)},
        r"a\.weight: scales of shape \(32,\) do not fit the weight's \(32, 32\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    scheme, more, words = REFUSED[case]
    save(tmp_path / "aligned", {"a.weight": FLOAT8, **more}, scheme)
    save(tmp_path / "base", {"a.weight": FLOAT8})
    with pytest.raises(UnsupportedModelError, match=words):
        plan_hardening(tmp_path / "aligned", LoxConfig(str(tmp_path / "base")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e8m0fnu])
def test_dtypes_that_are_not_edited(dtype: torch.dtype, tmp_path: Path) -> None:
    for side in ("aligned", "base"):
        save(tmp_path / side, {"a.weight": draw(32, 32).abs().to(dtype)})
    with pytest.raises(UnsupportedModelError, match=rf"a\.weight: {str(dtype).removeprefix('torch.')}"):
        plan_hardening(tmp_path / "aligned", LoxConfig(str(tmp_path / "base")))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none(value: float, tmp_path: Path) -> None:
    scales = torch.ones(2, 2)
    save(tmp_path / "base", {"a.weight": FLOAT8, "a.weight_scale_inv": scales.clone()}, FP8)
    scales[1, 0] = value
    save(tmp_path / "aligned", {"a.weight": FLOAT8, "a.weight_scale_inv": scales}, FP8)
    with pytest.raises(NumericsError, match=r"a\.weight_scale_inv: a scale is negative, NaN or Inf"):
        harden_checkpoint(tmp_path / "aligned", tmp_path / "out", LoxConfig(str(tmp_path / "base"), r=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cast_base", [False, True])
def test_float8_without_scales_needs_its_like(cast_base: bool, tmp_path: Path) -> None:
    save(tmp_path / "aligned", {"a.weight": FLOAT8})
    save(tmp_path / "base", {"a.weight": FLOAT8.bfloat16()})
    with pytest.raises(PairingError, match=r"a\.weight: float8_e4m3fn against bfloat16 .*same precision"):
        plan_hardening(tmp_path / "aligned", LoxConfig(str(tmp_path / "base"), cast_base=cast_base))
