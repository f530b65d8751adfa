"""Plans of models that are not there, what hardening will take, and how the command line says it."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, DeepseekV3Config

import zoo
from fake_hub import FakeHub, Repo
from lox_hf import HardeningPlan, LoxConfig, SafetySubspace, plan_hardening
from lox_hf.cli.plan_table import LONG, estimate_table, fold, plan_table
from lox_hf.cli.words import duration
from lox_hf.edit.tensor import BaseFactors, edit_tensor
from lox_hf.errors import AlreadyHardenedError, CheckpointError, UnsupportedModelError
from lox_hf.estimate import FLOAT8_BYTES, cost, estimate, longest_share, size_bytes
from lox_hf.records import HardeningEstimate, ModelReference, TensorPlan
from lox_hf.weights.planned import has_no_weights
from lox_hf.weights.source import DictSource
from test_bad_input import contents
from test_cli import Run
from test_scaled import COMPRESSED, E4M3, draw, save

DEEPSEEK_V3_PARAMETERS = 671_026_419_200
"""As on the model's card (671 B), without the layer for several tokens at once, which transformers leaves out."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    zoo.save_pair("llama", folder)
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_bytes((folder / "aligned" / "config.json").read_bytes())
    return folder


def edited(rows: int, columns: int, **changes: object) -> TensorPlan:
    """The plan of one matrix."""
    return replace(TensorPlan("a.weight", (rows, columns), "bfloat16", 6, 1.25, True, "target"), **changes)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_config_tells_every_tensor(kind: str, tmp_path: Path) -> None:
    pair = zoo.save_pair(kind, tmp_path)
    (tmp_path / "bare").mkdir()
    AutoConfig.from_pretrained(pair.aligned_dir).save_pretrained(tmp_path / "bare")
    real, planned = plan_hardening(pair.aligned_dir, LoxConfig(str(pair.base_dir))), plan_hardening(tmp_path / "bare")
    assert {item.name: item for item in planned.tensors} == {item.name: item for item in real.tensors}
    assert planned.total_bytes == real.total_bytes
    assert planned.is_from_config and not real.is_from_config


def test_all_linear_from_a_config(here: Path) -> None:
    config = LoxConfig("base", target_modules="all-linear")
    real, planned = plan_hardening("aligned", config), plan_hardening("bare", config)
    assert {item.name for item in planned.edited} == {item.name for item in real.edited}
    assert len(planned.edited) < len(plan_hardening("bare").edited)  # control


def test_deepseek_v3_by_name(tmp_path: Path) -> None:
    """Names and shapes as in the index of deepseek-ai/DeepSeek-V3, whose config is the default one."""
    DeepseekV3Config(dtype="bfloat16", architectures=["DeepseekV3ForCausalLM"]).save_pretrained(tmp_path)
    plan = plan_hardening(tmp_path)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    assert sum(math.prod(tensor.shape) for tensor in plan.tensors) == DEEPSEEK_V3_PARAMETERS
    assert tensors["model.layers.3.mlp.experts.0.gate_proj.weight"].shape == (2048, 7168)
    assert tensors["model.layers.60.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert tensors["model.layers.60.mlp.gate.e_score_correction_bias"].dtype == "float32"
    assert tensors["lm_head.weight"].dtype == "bfloat16"
    lines = plan_table(plan).splitlines()
    assert any("experts.{0..255}.up_proj.weight" in line and "(2048, 7168) x 14848" in line for line in lines)
    assert f"Folded: {len(plan.tensors)} tensors in {len(fold(plan.tensors))} lines" in plan_table(plan)


def test_a_config_that_names_no_dtype_is_of_float32(here: Path) -> None:
    values = json.loads(Path("bare/config.json").read_text())
    del values["dtype"]
    Path("bare/config.json").write_text(json.dumps(values))
    assert {tensor.dtype for tensor in plan_hardening("bare").tensors} == {"float32"}


def test_a_dry_run_of_a_config_alone(here: Path, run: Run) -> None:
    before = contents(here)
    code, out, _ = run("harden", "bare", "--dry-run", "--r", "3", "--exclude-modules", "lm_head")
    assert code == 0 and contents(here) == before
    assert "planned from config.json alone: no weights are there" in out and "not read" in out
    assert "15 tensors to edit, 6 to copy" in out and "r 3, alpha 1.25" in out
    code, out, err = run("harden", "bare")
    assert (code, out) == (2, "") and "model.safetensors" in err and contents(here) == before
    code, out, _ = run("harden", "aligned", "--base-model", "base", "--dry-run")  # control
    assert code == 0 and "config.json alone" not in out


def test_a_config_on_the_hub_is_enough(here: Path) -> None:
    with FakeHub("hf_token") as hub:
        hub.repos["org/bare"] = Repo()
        hub.repos["org/bare"].commit({"config.json": Path("bare/config.json").read_bytes()})
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(here / "home"), "HF_HUB_OFFLINE": "0"}
        words = ["-m", "lox_hf.cli", "harden", "org/bare", "--dry-run", "--json"]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    plan = HardeningPlan.from_json(done.stdout)
    assert plan.is_from_config and plan.tensors == plan_hardening("bare").tensors
    assert plan.aligned == ModelReference("org/bare", hub.head("org/bare"))


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_weights_that_are_there_are_not_planned_without(name: str, here: Path) -> None:
    assert has_no_weights(Path("bare")) and not has_no_weights(Path("aligned"))
    Path("bare", name).write_bytes(b"cut off")
    assert not has_no_weights(Path("bare"))
    with pytest.raises(CheckpointError):
        plan_hardening("bare", LoxConfig("base"))


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModelError, "quantization_config"),
        ({"lox_config": {"r": 6, "alpha": 1.25}}, AlreadyHardenedError, "bare"),
        ({"model_type": "no_such_type"}, CheckpointError, "no_such_type"),
    ],
)
def test_configs_that_cannot_be_planned(values: dict, error: type, words: str, here: Path) -> None:
    path = Path("bare/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(error, match=words):
        plan_hardening("bare")


def test_cost_grows_with_what_is_done() -> None:
    copied = edited(1024, 1024, edit=False)
    full, few, many = (edited(1024, 1024, r=r) for r in (None, 6, 32))
    assert 0 < cost(copied) < cost(full) < cost(few) < cost(many) < cost(few, "exact")
    assert cost(edited(1024, 1024, r=0.5)) == cost(many)  # taken for that rank
    assert cost(edited(64, 4096)) == cost(edited(64, 4096), "exact")  # small matrices are decomposed exactly anyway
    stack = replace(few, shape=(8, 1024, 1024))
    assert cost(stack) == pytest.approx(8 * cost(few)) and size_bytes(stack) == 8 * 2 * 1024**2
    assert cost(edited(0, 4, edit=False)) == 0
    assert cost(TensorPlan("scale", (), "float32", None, 0.0, False, "fewer than two dims")) > 0
    assert size_bytes(edited(8, 8, dtype="F4")) == 64
    assert 1.5 * cost(few) < cost(replace(few, dtype="float8_e4m3fn")) < 1.7 * cost(few)  # turned into float32


def test_the_heaviest_tensor_bounds_the_time() -> None:
    assert longest_share([4.0, 4.0, 4.0, 4.0], 2) == 8.0
    assert longest_share([10.0, 1.0, 1.0], 4) == 10.0


def test_bytes_of_a_real_checkpoint(here: Path) -> None:
    size = sum(tensor.nbytes for tensor in zoo.read_checkpoint(Path("aligned")).values())
    config = LoxConfig("base", target_modules=["q_proj"])
    plan = plan_hardening("aligned", config)
    found = estimate(plan, config, num_workers=1)
    assert found.write_bytes == size
    assert found.read_bytes == size + 2 * 2 * 96 * 96  # of the base only what is edited, in two layers
    assert found.work_s > 0 and (found.threads, found.processes) == (1, 1)
    subspace = SafetySubspace.from_models("aligned", config=config)
    assert estimate(plan_hardening("aligned", base_model=subspace), config).read_bytes == size
    assert HardeningPlan.from_json(replace(plan, estimate=found).to_json()).estimate == found


@pytest.mark.parametrize("changes", [{"r": 6}, {"r": None}, {"r": 32}, {"r": 1, "shape": (48, 4096)}])
def test_the_time_is_that_of_the_work(changes: dict) -> None:
    """Five times is far: it lets a machine be busy in one of the two, and a wrong unit or a lost factor not pass."""
    tensor = edited(1024, 3072, **changes)
    plan = HardeningPlan(ModelReference("a"), ModelReference("b"), "config", (tensor,), size_bytes(tensor))
    base = 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    left, right = (torch.randn(side, 6, generator=torch.Generator().manual_seed(1)) for side in tensor.shape)
    aligned = base + 1e-3 * left @ right.T / 64 + 1e-4 * torch.randn_like(base)
    factors = BaseFactors(DictSource({tensor.name: base.bfloat16()}, "base"), LoxConfig(), None)

    def once() -> float:
        started = time.perf_counter()
        edit_tensor(tensor, aligned.bfloat16(), factors, lambda *_: None)
        return time.perf_counter() - started

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        took = min(once() for _ in range(5))
        found = estimate(plan, LoxConfig(), num_workers=1).work_s
    finally:
        torch.set_num_threads(threads)
    assert took / 5 < found < 5 * took


WATCHED = """
import sys, threading, time
from lox_hf import LoxConfig, harden_checkpoint
import torch
torch.set_num_threads(1)
highest, done = 0, threading.Event()
def watch():
    global highest
    while not done.wait(0.002):
        lines = open("/proc/self/status").read().splitlines()
        highest = max(highest, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
watcher = threading.Thread(target=watch)
watcher.start()
harden_checkpoint("aligned", "out", LoxConfig("base"), num_workers=1)
done.set()
watcher.join()
print(highest)
"""


def assert_memory_is_as_estimated(folder: Path) -> None:
    """Harden the folder's pair and compare the highest memory with the estimate."""
    child = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=True, cwd=folder)
    config = LoxConfig(str(folder / "base"))
    found = estimate(plan_hardening(folder / "aligned", config), config, num_workers=1).memory_bytes
    assert int(child.stdout) * 0.8 < found < int(child.stdout) * 1.35


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_the_memory_is_that_of_the_run(here: Path) -> None:
    assert_memory_is_as_estimated(here)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_a_scale_of_the_whole_tensor_holds_all_its_rows(tmp_path: Path) -> None:
    """Each is rounded by the largest number of all, which is known at the end: 64 MiB here."""
    base = draw(4096, 4096)
    change = draw(4096, 4, seed=1) @ draw(4, 4096, seed=2)
    for side, weight in (("base", base), ("aligned", base + 0.3 * change)):
        tensors = {"a.weight": (weight / 0.02).clamp(-448, 448).to(E4M3), "a.weight_scale": torch.full((1,), 0.02)}
        save(tmp_path / side, tensors, COMPRESSED)
    assert_memory_is_as_estimated(tmp_path)


@pytest.mark.parametrize(
    ("grid", "rows"), [((1,), 4096), ((32, 64), 128), ((4096, 1), 1), (None, 4096)], ids=["one", "blocks", "rows", "0"]
)
def test_memory_of_float8_is_that_of_its_blocks(grid: tuple[int, ...] | None, rows: int) -> None:
    weight = edited(4096, 8192, dtype="float8_e4m3fn")
    scales = [] if grid is None else [TensorPlan("a.weight_scale", grid, "float32", None, 0.0, False, "scale of it")]
    scaled, full = (
        estimate(
            HardeningPlan(ModelReference("a"), ModelReference("b"), "config", (tensor, *scales), 1),
            LoxConfig(),
            num_workers=2,
        )
        for tensor in (weight, replace(weight, dtype="bfloat16"))
    )
    assert scaled.memory_bytes - full.memory_bytes == FLOAT8_BYTES + 2 * 5 * rows * 8192


def test_a_dry_run_says_what_it_takes(here: Path, run: Run) -> None:
    words = ("harden", "aligned", "--base-model", "base", "--dry-run")
    code, out, _ = run(*words)
    rows = dict(re.findall(r"^(to read|to write|disk|memory|time) +(.+)$", out, re.MULTILINE))
    assert code == 0 and len(rows) == 5
    assert re.match(r"\d+ MiB a process", rows["memory"]) and "on 1 process of" in rows["time"]
    plan = HardeningPlan.from_json(run(*words, "--json")[1])
    assert plan.estimate and plan.estimate.write_bytes == plan.total_bytes
    assert plan_hardening("aligned", LoxConfig("base")).estimate is None  # nobody has asked


def test_a_dry_run_says_what_would_keep_the_run_from_working(here: Path, run: Run) -> None:
    """What is wrong with the output is said below the plan, which is right all the same."""
    words = ("harden", "aligned", "--base-model", "base", "--dry-run")
    before = contents(here)
    for output, why in (("aligned", "is an input"), ("base/out", "lies inside one"), ("bare", "exists")):
        code, out, err = run(*words, "--output", output)
        assert code == 2 and "Nothing was written" in out and "to read" in out and why in err
    code, out, err = run(*words, "--device", "cuda:99")
    assert (code, out) == (2, "") and "cuda:99" in err
    code, _, err = run("harden", "bare", "--dry-run", "--output", "aligned")  # nothing can be written from it anyway
    assert (code, err) == (0, "")
    assert run(*words, "--output", "new")[0] == 0 and contents(here) == before  # control


def test_what_goes_to_the_hub_needs_no_disk() -> None:
    found = HardeningEstimate(3 * 10**9, 2 * 10**9, 2**28, threads=4, processes=1, work_s=100.0)
    plan = HardeningPlan(ModelReference("a"), ModelReference("b"), "config", (edited(64, 64),), 2 * 10**9)
    assert "disk         2.000 GB needed" in estimate_table(plan, found)
    assert "to read      3.000 GB (if the base is stored in the aligned model's dtypes)" in estimate_table(plan, found)
    assert "disk         two of the largest shard" in estimate_table(plan, found, to_hub=True)
    assert "2 min on 1 process of 4 threads" in estimate_table(plan, found)
    assert "disk's time  5.0 s at 1 GB/s" in estimate_table(plan, found) and "note" not in estimate_table(plan, found)
    share = replace(plan, tensors=(edited(64, 64, r=0.9),))
    assert "r as a share" in estimate_table(share, found)


def two_processes(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in two processes under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "lox_hf.cli", "harden", "aligned", "--base-model", "base", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.distributed
def test_processes_share_the_time_and_one_speaks(here: Path) -> None:
    done = two_processes("--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = HardeningPlan.from_json(done.stdout)  # once, and nothing else
    assert plan.estimate and (plan.estimate.processes, plan.estimate.threads) == (2, 1)


@pytest.mark.distributed
def test_the_way_to_the_hub_is_one_process_alone(here: Path) -> None:
    done = two_processes("--push-to", "org/none")
    assert done.returncode != 0 and done.stdout == ""
    assert "--push-to works in one process" in done.stderr


def test_folding_keeps_apart_what_is_not_alike() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in (0, 1, 2, 5) for expert in range(300)]
    tensors = [edited(64, 32, name=name) for name in names]
    tensors[7] = replace(tensors[7], alpha=0.5)
    tensors.append(edited(64, 32, name="model.0"))
    groups = fold(tuple(tensors))
    assert [pattern for pattern, _ in groups] == [
        "model.layers.{0..2,5}.mlp.experts.{0..299}.w1",
        "model.layers.0.mlp.experts.7.w1",
        "model.0",
    ]
    assert sum(len(group) for _, group in groups) == len(tensors)
    plan = HardeningPlan(ModelReference("a"), None, "config", tuple(tensors), 1)
    text = plan_table(plan)
    assert "(64, 32) x 1199" in text and "r 6, alpha 0.5" in text and "Folded: 1201 tensors in 3 lines" in text
    few = plan_table(replace(plan, tensors=tuple(tensors[:LONG])))
    assert "Folded" not in few and names[LONG - 1] in few


def test_folding_loses_nothing_where_two_groups_have_one_pattern() -> None:
    """As in a chess board: each group has both numbers at both places."""
    tensors = [
        edited(64, 32, name=f"layers.{layer}.experts.{expert}.w1", alpha=1.0 + (layer + expert) % 2)
        for layer in (0, 1)
        for expert in (0, 1)
    ]
    groups = fold(tuple(tensors))
    assert [(pattern, len(group)) for pattern, group in groups] == [("layers.{0..1}.experts.{0..1}.w1", 2)] * 2


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.25, "0.2 s"), (42, "42 s"), (300, "5 min"), (7199, "120 min"), (12600, "3.5 h")]
)
def test_times_are_written_in_the_unit_they_are_read_in(seconds: float, words: str) -> None:
    assert duration(seconds) == words
