"""float8 checkpoints on the way through the Hub, and whether a published one is what it says."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load, save

import zoo
from fake_hub import FakeHub, Repo
from lox_hf import LoxConfig, harden_checkpoint, verify
from test_hub import TOKEN, World
from test_scaled import FP8, quantise, write

NAME = "model.layers.0.mlp.up_proj.weight"

PROGRAM = """
import sys
from lox_hf import LoxConfig, LoxError, harden_to_hub
try:
    harden_to_hub(sys.argv[1], sys.argv[2], LoxConfig("org/base", r=4), work_dir="work")
except LoxError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with a float8 pair, and the aligned model once more with scales apart from their weights."""
    root = tmp_path_factory.mktemp("float8")
    zoo.save_pair("llama", root / "plain", max_shard_size="10MB")
    (root / "work").mkdir()
    for side, name, shards in (("aligned", "aligned", 1), ("base", "base", 1), ("aligned", "apart", 2)):
        like = root / "plain" / side
        write(root / name, quantise(zoo.read_checkpoint(like)), FP8, like, shards)
    with FakeHub(TOKEN) as hub:
        for name in ("aligned", "base", "apart"):
            hub.repos[f"org/{name}"] = Repo(private=True)
            hub.repos[f"org/{name}"].commit({path.name: path.read_bytes() for path in (root / name).iterdir()})
        yield World(hub, root)


@pytest.fixture(scope="module")
def local(world: World) -> Path:
    """The same by the local route."""
    harden_checkpoint(world.root / "aligned", world.root / "out", LoxConfig(str(world.root / "base"), r=4))
    return world.root / "out"


def test_from_hub_to_hub_gives_the_bytes_of_the_local_route(world: World, local: Path) -> None:
    done = world.run("-c", PROGRAM, "org/aligned", "org/hardened")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    published = world.hub.repos["org/hardened"].at("main")[1]["model.safetensors"]
    assert published == (local / "model.safetensors").read_bytes()
    assert published != (world.root / "aligned" / "model.safetensors").read_bytes()


def test_scales_in_another_file_are_refused_before_any_work(world: World) -> None:
    done = world.run("-c", PROGRAM, "org/apart", "org/none")
    assert "have their scales in another" in done.stdout, done.stderr
    assert "org/none" not in world.hub.repos


def test_a_hardened_model_is_verified(local: Path) -> None:
    report = verify(local)
    assert report.verified
    assert {check.verdict for check in report.tensors} == {"exact"}


@pytest.mark.parametrize("tampered", [NAME, NAME + "_scale_inv"])
def test_a_changed_model_is_not(tampered: str, local: Path, tmp_path: Path) -> None:
    for path in local.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load((local / "model.safetensors").read_bytes())
    tensors[tampered] = (tensors[tampered].float() * 2).to(tensors[tampered].dtype)
    (tmp_path / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    report = verify(tmp_path)
    assert not report.verified
    assert [check.name for check in report.tensors if check.verdict != "exact"] == [tampered]


@pytest.mark.parametrize("tampered", [NAME, NAME + "_scale_inv"])
@pytest.mark.parametrize("edited", [True, False])
def test_a_weight_or_scales_of_another_form_are_told_with_their_partner(
    edited: bool, tampered: str, world: World, tmp_path: Path
) -> None:
    """Scales of one row of blocks fit the weight too, so the published model can be read as it stands."""
    config = LoxConfig(str(world.root / "base"), r=4, exclude_modules=[] if edited else ["up_proj"])
    harden_checkpoint(world.root / "aligned", tmp_path / "out", config)
    tensors = load((tmp_path / "out" / "model.safetensors").read_bytes())
    tensors[tampered] = tensors[NAME].bfloat16() if tampered == NAME else tensors[tampered][:1].contiguous()
    (tmp_path / "out" / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    report = verify(tmp_path / "out")
    wrong = {check.name: check for check in report.tensors if check.verdict != "exact"}
    (partner,) = set(wrong) - {tampered}
    assert {partner, tampered} == {NAME, NAME + "_scale_inv"}
    assert "expected" in wrong[tampered].detail
    assert wrong[partner].detail == f"stands for nothing without {tampered}, which differs"
    assert {check.name: check.edited for check in wrong.values()} == {NAME: edited, NAME + "_scale_inv": False}


def test_the_config_keeps_the_scheme(local: Path) -> None:
    assert json.loads((local / "config.json").read_text())["quantization_config"] == FP8
