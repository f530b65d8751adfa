"""Verification: a true model passes, and whatever was altered is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from lox_hf import LoxConfig, SafetySubspace, VerificationReport, harden_checkpoint, verify
from lox_hf.cli.main import main
from lox_hf.errors import CheckpointError, ConfigError, OutputError, PairingError, UnsupportedModelError

EDITED = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
SHIFT = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
"""Bits of the mantissa."""


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair and its hardened model in one dtype."""
    root = tmp_path_factory.mktemp("verify")
    pair = zoo.save_pair("llama", root, dtype=request.param)
    harden_checkpoint(pair.aligned_dir, root / "hardened", LoxConfig(str(pair.base_dir), r=3))
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the hardened model that a test may alter."""
    return Path(shutil.copytree(made / "hardened", tmp_path / "copy"))


def alter(folder: Path, name: str, change: Any) -> None:
    """Change one tensor of a checkpoint: the new one, or None to leave it out."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    tensor = change(tensors.pop(name))
    if tensor is None:
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors[name] = tensor
    save_file(tensors, shard, {"format": "pt"})


def flip(bit: int, at: int = 11) -> Any:
    """A change of one bit of one number."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        integers = torch.int32 if tensor.dtype.itemsize == 4 else torch.int16
        tensor.view(integers).view(-1)[at] ^= 1 << bit
        return tensor

    return change


def restamp(folder: Path, **settings: Any) -> None:
    """Change what the stamp says."""
    config = json.loads((folder / "config.json").read_text())
    config["lox_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


def wrong(report: VerificationReport) -> list[str]:
    """Names of the tensors that are wrong."""
    return [check.name for check in report.wrong]


def test_a_true_model_passes_bit_for_bit(made: Path) -> None:
    report = verify(made / "hardened", exact=True)
    assert report.verified and not report.problems
    assert {check.verdict for check in report.tensors} == {"exact"}
    assert {check.name for check in report.tensors} == set(zoo.read_checkpoint(made / "aligned"))
    assert VerificationReport.from_json(report.to_json()).tensors[0].name == report.tensors[0].name


def test_one_flipped_bit_is_found_and_named(copy: Path, made: Path) -> None:
    dtype = zoo.read_checkpoint(made / "hardened")[EDITED].dtype
    alter(copy, EDITED, flip(SHIFT[dtype]))  # the lowest bit of the exponent: half or twice the number
    report = verify(copy)
    assert not report.verified and wrong(report) == [EDITED]
    check = report.wrong[0]
    assert check.differing == 1 and check.largest_ulps > 1


def test_the_last_bit_of_one_number_is_told_apart(copy: Path) -> None:
    alter(copy, EDITED, flip(0))
    report = verify(copy)
    assert report.verified and [check.name for check in report.rounded] == [EDITED]
    assert report.rounded[0].differing == 1 and report.rounded[0].largest_ulps <= 1
    assert not verify(copy, exact=True).verified


def test_many_last_bits_are_no_rounding(copy: Path, made: Path) -> None:
    if zoo.read_checkpoint(made / "hardened")[EDITED].dtype == torch.float32:
        pytest.skip("float32 is judged by the decomposition's tolerance")

    def every_tenth(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int16).view(-1)[::10] ^= 1
        return tensor

    alter(copy, EDITED, every_tenth)
    assert wrong(verify(copy)) == [EDITED]


@pytest.mark.parametrize("bit", [0, 5])
def test_a_weight_that_is_not_edited_must_not_differ_at_all(bit: int, copy: Path) -> None:
    alter(copy, NORM, flip(bit))
    report = verify(copy)
    assert not report.verified and wrong(report) == [NORM]
    assert (report.wrong[0].edited, report.wrong[0].differing) == (False, 1)


def test_not_a_number_and_minus_zero_are_seen(copy: Path) -> None:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = float("nan")
        return tensor

    alter(copy, EDITED, poison)
    assert wrong(verify(copy)) == [EDITED]


def test_a_wrong_alpha_in_the_stamp(copy: Path) -> None:
    restamp(copy, alpha=2.0)
    report = verify(copy)
    assert not report.verified and EDITED in wrong(report) and NORM not in wrong(report)
    assert report.problems == ("alpha: the stamp says 2.0, lox_report.json says 1.25",)


def test_a_stamp_that_contradicts_the_report_in_words_only(copy: Path) -> None:
    restamp(copy, aligned_revision="abc")
    report = verify(copy)
    assert not report.verified and not report.wrong
    assert len(report.problems) == 1 and report.problems[0].startswith("aligned model: the stamp says")


def test_a_card_that_says_something_else(copy: Path) -> None:
    card = "---\nlox:\n  r: 3\n  alpha: 2.0\n  base: {model: org/another, revision: null}\n---\n"
    (copy / "README.md").write_text(card)
    report = verify(copy)
    assert not report.verified and not report.wrong
    assert report.problems[0] == "alpha: the stamp says 1.25, README.md says 2.0"
    assert [text.split(":")[0] for text in report.problems] == ["alpha", "base"]
    (copy / "README.md").write_text("---\nlox:\n  r: 3\n  alpha: 1.25\n---\n")
    assert verify(copy).verified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_aligned_weights_do_not_pass_for_a_small_change(dtype: torch.dtype, tmp_path: Path) -> None:
    """Neither where hardly a number changes in half precision, nor where the stamp asks for a wide tolerance."""
    pair = zoo.save_pair("llama", tmp_path, dtype=dtype)
    alpha = 1e-3 if dtype == torch.bfloat16 else 0.5
    config = LoxConfig(str(pair.base_dir), r=3, alpha=alpha)
    harden_checkpoint(pair.aligned_dir, tmp_path / "hardened", config)
    assert verify(tmp_path / "hardened").verified
    aligned, hardened = (zoo.read_checkpoint(folder) for folder in (pair.aligned_dir, tmp_path / "hardened"))
    nearly = aligned[EDITED] if dtype == torch.bfloat16 else torch.lerp(hardened[EDITED], aligned[EDITED], 0.1)
    changed = int((aligned[EDITED] != hardened[EDITED]).sum())
    assert changed > 1
    alter(tmp_path / "hardened", EDITED, lambda _: nearly.contiguous())
    restamp(tmp_path / "hardened", svd_tol=0.99)
    (tmp_path / "hardened" / "lox_report.json").unlink()
    assert wrong(verify(tmp_path / "hardened")) == [EDITED]


def test_what_is_no_checkpoint(copy: Path, made: Path, tmp_path: Path) -> None:
    SafetySubspace.from_models(made / "aligned", made / "base", LoxConfig(r=3)).save_pretrained(tmp_path / "subspace")
    with pytest.raises(UnsupportedModelError, match="is a subspace"):
        verify(tmp_path / "subspace")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="is an adapter"):
        verify(tmp_path / "adapter")
    with pytest.raises(OutputError, match="no folder"):
        verify(copy, work_dir=tmp_path / "nowhere")


def test_a_swapped_base(copy: Path, made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made / "base", other)
    alter(other, EDITED, lambda tensor: tensor + 0.05 * torch.randn(tensor.shape).to(tensor.dtype))
    assert wrong(verify(copy, base=other)) == [EDITED]
    assert verify(copy, base=made / "base").verified
    with pytest.raises(PairingError, match="same checkpoint"):
        verify(copy, base=made / "aligned")


def test_missing_extra_and_other_tensors(copy: Path) -> None:
    alter(copy, EDITED, lambda tensor: None)
    alter(copy, NORM, lambda tensor: tensor.double())
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    save_file({"stray\x1b[31m": torch.zeros(2)}, copy / "stray.safetensors")
    index["weight_map"]["stray\x1b[31m"] = "stray.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    details = {check.name: check.detail for check in verify(copy).wrong}
    assert details.pop(EDITED) == "missing"
    assert details.pop(NORM).startswith("float64 of shape (96,), expected ")
    assert details == {"stray\x1b[31m": "not in the aligned model"}


def test_the_command_says_it_and_exits_with_1(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    assert "Verified: the weights are what the model says." in capsys.readouterr().out
    alter(copy, NORM, flip(5))
    assert main(["verify", str(copy)]) == 1
    printed = capsys.readouterr().out
    assert f"Different: {NORM}: 1 of 96 numbers are not those of the aligned model" in printed
    assert "NOT verified." in printed
    assert main(["verify", str(copy), "--json"]) == 1
    assert not VerificationReport.from_json(capsys.readouterr().out).verified


def test_models_that_cannot_be_verified(copy: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"does not say that LoX hardened it.*no lox_config"):
        verify(made / "aligned")
    restamp(copy, aligned_model_name_or_path=str(made / "moved"))
    with pytest.raises(CheckpointError, match=r"There is no folder .*moved.*--aligned"):
        verify(copy)
    assert main(["verify", str(copy)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not verify(copy, aligned=made / "aligned").wrong
    restamp(copy, alpha="much")
    with pytest.raises(ConfigError, match=r"The lox_config of .* is not valid: .*alpha"):
        verify(copy)
    restamp(copy, aligned_model_name_or_path=7)
    with pytest.raises(CheckpointError, match="does not name the aligned model"):
        verify(copy)


def test_a_report_that_is_none(copy: Path) -> None:
    (copy / "lox_report.json").write_text('{"tensors": 3}')
    with pytest.raises(CheckpointError, match=r"lox_report.json is not the report of a hardening"):
        verify(copy)
    (copy / "lox_report.json").unlink()  # as in a model that was saved from memory
    assert verify(copy).verified


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    pair = zoo.save_pair(kind, tmp_path)
    harden_checkpoint(pair.aligned_dir, tmp_path / "hardened", LoxConfig(str(pair.base_dir), r=2))
    assert verify(tmp_path / "hardened", exact=True).verified


def test_full_rank_patterns_and_a_subspace(tmp_path: Path) -> None:
    pair = zoo.save_pair("llama", tmp_path)
    full = LoxConfig(str(pair.base_dir), r=None, alpha=0.5, exclude_modules=["lm_head"], alpha_pattern={"q_proj": 0})
    harden_checkpoint(pair.aligned_dir, tmp_path / "full", full)
    assert verify(tmp_path / "full", exact=True).verified
    subspace = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LoxConfig(r=6))
    harden_checkpoint(pair.aligned_dir, tmp_path / "by-subspace", LoxConfig(r=6), base_model=subspace)
    report = verify(tmp_path / "by-subspace")
    assert report.verified, [check for check in report.wrong]
