"""Work on a device: no GPU is needed, since the same code runs on "cpu:0", where nothing counts as being yet."""

import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from lox_hf import (
    ConfigError,
    LoxConfig,
    NumericsError,
    SafetySubspace,
    UnsupportedModelError,
    apply_lox,
    revert_lox,
)
from lox_hf.core.batched import batch_bytes
from lox_hf.core.lanczos import Triplets
from lox_hf.core.scaled import Blocks, ScaledTensor
from lox_hf.edit import batches as edit_batches
from lox_hf.edit import model as edit_model
from lox_hf.edit.batches import find_in_batches
from lox_hf.edit.model import each_tensor, edit_tensors
from lox_hf.edit.tensor import BaseFactors, MatrixSink, edit_tensor, matrices
from lox_hf.parallel import staging
from lox_hf.parallel.device import CPU, in_batches, memory_budget, resolve_device
from lox_hf.parallel.staging import Drain, Stage
from lox_hf.records import TensorPlan, TensorReport
from lox_hf.weights.selection import select
from lox_hf.weights.source import DictSource

DEVICE = torch.device("cpu", 0)
"""Computes as the CPU does, but is not equal to the device of any tensor: so everything is staged."""
CONFIG = LoxConfig(r=6, alpha=1.25)


def change(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    low_rank = torch.randn(*shape[:-1], 8, generator=generator) @ torch.randn(8, shape[-1], generator=generator)
    return 0.01 * low_rank + 0.002 * torch.randn(shape, generator=generator)


@pytest.fixture
def pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Matrices of two shapes, a stack of experts, one that is too small for a batch, an unchanged one, and a norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{number}.q.weight": (128, 96) for number in range(4)}
    shapes |= {f"layers.{number}.up.weight": (160, 96) for number in range(2)}
    shapes |= {"experts.up": (3, 96, 128), "small.weight": (40, 24)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    aligned = {name: (tensor.float() + change(tensor.shape, generator)).bfloat16() for name, tensor in base.items()}
    aligned["layers.3.q.weight"] = base["layers.3.q.weight"].clone()
    for side in (aligned, base):
        side["norm.weight"] = torch.ones(96, dtype=torch.bfloat16)
    return aligned, base


class Collect:
    """A target in memory that checks what the protocol promises."""

    def __init__(self, aligned: Mapping[str, Tensor], slow: float = 0.0) -> None:
        self.aligned, self.slow = aligned, slow
        self.out = {name: torch.full_like(tensor, torch.nan) for name, tensor in aligned.items()}
        self.copied: list[str] = []

    def sink(self, plan: TensorPlan, aligned: Tensor) -> MatrixSink:
        out, next_rows = matrices(self.out[plan.name]), [0] * len(matrices(aligned))

        def write(number: int, part: slice, tile: Tensor) -> None:
            time.sleep(self.slow)
            assert part.start == next_rows[number]  # from top to bottom
            next_rows[number] = part.stop
            out[number][part] = tile

        return write

    def copy(self, plan: TensorPlan) -> None:
        self.out[plan.name].copy_(self.aligned[plan.name])
        self.copied.append(plan.name)


def live_pair() -> tuple[nn.Sequential, nn.Sequential]:
    """A base in memory and what alignment made of it."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(96, 96) for _ in range(4))).bfloat16()
    aligned = copy.deepcopy(base)
    for parameter in aligned.parameters():
        if parameter.dim() > 1:
            parameter.data += change(tuple(parameter.shape), torch.Generator().manual_seed(1)).bfloat16()
    return base, aligned


def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take `DEVICE` for an accelerator."""
    monkeypatch.setattr(edit_model, "in_batches", lambda device: device == DEVICE)


def open_both(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], config: LoxConfig = CONFIG
) -> tuple[list[TensorPlan], DictSource, BaseFactors]:
    aligned = DictSource(pair[0], "aligned")
    return select(aligned.infos(), config), aligned, BaseFactors(DictSource(pair[1], "base"), config, None)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        LoxConfig(r=0.5),
        LoxConfig(r=None, alpha=0.5),
        LoxConfig(r=6, svd="exact"),
        LoxConfig(r=6, cast_base=True),
        LoxConfig(r=6, rank_pattern={"layers.1.q": 3}, alpha_pattern={"layers.0.q": 0.0}),
    ],
    ids=["rank", "energy", "full", "exact", "cast", "patterns"],
)
def test_as_on_the_cpu(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], config: LoxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BUFFER_BYTES", 4096)  # several pieces for each tile
    plans, aligned, factors = open_both(pair, config)
    wanted, found = Collect(pair[0]), Collect(pair[0])
    reports = edit_tensors(plans, aligned, factors, wanted, progressbar=False)
    on_device(monkeypatch)
    there = edit_tensors(plans, aligned, factors, found, device=DEVICE, progressbar=False)
    assert [(report.name, report.rank, report.method) for report in reports] == [
        (report.name, report.rank, report.method) for report in there
    ]
    for one, other in zip(reports, there, strict=True):
        assert torch.allclose(torch.tensor(one.singular_values), torch.tensor(other.singular_values), rtol=1e-5)
        assert one.delta_norm == pytest.approx(other.delta_norm, rel=1e-6)
    for name, tensor in wanted.out.items():
        differ = tensor != found.out[name]
        # What lies between two bfloat16 numbers to float32's own precision rounds either way.
        assert differ.sum() <= 1e-3 * tensor.numel() and torch.allclose(tensor, found.out[name], rtol=2**-7), name
    assert not torch.equal(wanted.out["layers.1.q.weight"], pair[0]["layers.1.q.weight"])  # control: it was edited
    assert found.copied == ["norm.weight"]


def test_float32_is_equal_up_to_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"{number}.weight": torch.randn(256, 192, generator=generator) for number in range(3)}
    aligned = {name: tensor + change(tensor.shape, generator) for name, tensor in base.items()}
    plans, source, factors = open_both((aligned, base))
    wanted, found = Collect(aligned), Collect(aligned)
    edit_tensors(plans, source, factors, wanted, progressbar=False)
    on_device(monkeypatch)
    edit_tensors(plans, source, factors, found, device=DEVICE, progressbar=False)
    for name, tensor in wanted.out.items():
        moved = (tensor - aligned[name]).norm()
        assert moved > 1 and (tensor - found.out[name]).norm() < 1e-4 * moved  # svd_tol


@pytest.mark.parametrize("budget", [1, 1_500_000, 2**30])
def test_batches_hold_what_the_budget_allows(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    whole = edit_batches.batched_lanczos

    def counted(deltas: Tensor, k: int, *, tol: float, seed: int) -> list[Triplets | None]:
        sizes.append(len(deltas))
        return whole(deltas, k, tol=tol, seed=seed)

    monkeypatch.setattr(edit_batches, "batched_lanczos", counted)
    plans, aligned, factors = open_both(pair)
    edited = [plan for plan in plans if plan.edit]
    methods = {}
    for plan, tensor, found in find_in_batches(edited, aligned, factors, device=DEVICE, budget_bytes=budget):
        assert torch.equal(tensor, pair[0][plan.name]) and tensor.data_ptr() != pair[0][plan.name].data_ptr()
        methods[plan.name] = [
            found.find(plan, number, matrix).method for number, matrix in enumerate(matrices(tensor))
        ]
    assert set(methods) == {plan.name for plan in edited}
    assert methods["experts.up"] == ["lanczos"] * 3 and methods["small.weight"] == ["exact"]
    assert methods["layers.3.q.weight"] == ["zero"]
    assert sorted(sizes) == {1: [], 1_500_000: [1, 1, 1, 2, 2, 2], 2**30: [2, 3, 4]}[budget]


@pytest.mark.parametrize(("device", "wanted"), [(CPU, [4]), (DEVICE, [1, 3])], ids=["there", "to be brought"])
def test_what_is_on_the_device_takes_nothing_of_the_budget(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]],
    device: torch.device,
    wanted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    whole = edit_batches.batched_lanczos
    monkeypatch.setattr(
        edit_batches, "batched_lanczos", lambda *args, **kw: sizes.append(len(args[0])) or whole(*args, **kw)
    )
    plans, aligned, factors = open_both(pair)
    alike = [plan for plan in plans if plan.shape == (128, 96)]
    budget = 4 * batch_bytes((128, 96), 6)
    for plan, tensor, found in find_in_batches(alike, aligned, factors, device=device, budget_bytes=budget):
        assert found.find(plan, 0, tensor).method in ("lanczos", "zero")
    assert sorted(sizes) == wanted


def test_groups_come_one_after_the_other(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, aligned, factors = open_both(pair)
    groups = {plan.name: int("1" in plan.name or "norm" in plan.name) for plan in plans}
    order: list[str] = []
    threads = set()

    def finished(plan: TensorPlan, reports: list[TensorReport]) -> None:
        assert not target.out[plan.name].isnan().any()  # all of it has been written
        order.append(plan.name)
        threads.add(threading.get_ident())

    target = Collect(pair[0], slow=0.001)
    on_device(monkeypatch)
    edit_tensors(
        plans, aligned, factors, target, device=DEVICE, progressbar=False, groups=groups, finished=finished
    )
    assert [groups[name] for name in order] == sorted(groups[name] for name in order) and len(order) == len(plans)
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_bad_numbers_are_named(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair[0]["experts.up"][1, 2, 3] = torch.nan
    plans, aligned, factors = open_both(pair)
    on_device(monkeypatch)
    with pytest.raises(NumericsError, match=r"experts.up\[1\]: dW contains NaN"):
        edit_tensors(plans, aligned, factors, Collect(pair[0]), device=DEVICE, progressbar=False)


@pytest.mark.parametrize("where", ["sink", "copy", "finished", "base"])
def test_a_failure_anywhere_ends_the_work_and_its_threads(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, aligned, factors = open_both(pair)
    done: list[str] = []

    def fail(*_: object) -> None:
        raise OSError("no space")

    class Failing(Collect):
        def sink(self, plan: TensorPlan, aligned: Tensor) -> MatrixSink:
            return fail if where == "sink" and plan.name == "layers.1.q.weight" else super().sink(plan, aligned)

        def copy(self, plan: TensorPlan) -> None:
            (fail if where == "copy" else super().copy)(plan)

    if where == "base":
        monkeypatch.setattr(factors.base, "get", fail)
    before = threading.active_count()
    on_device(monkeypatch)
    with pytest.raises(OSError, match="no space"):
        edit_tensors(
            plans,
            aligned,
            factors,
            Failing(pair[0]),
            device=DEVICE,
            progressbar=False,
            finished=fail if where == "finished" else lambda plan, _: done.append(plan.name),
        )
    assert threading.active_count() == before
    assert "layers.1.q.weight" not in done or where != "sink"  # what was not written is not reported
    assert where not in ("copy", "finished", "base") or not done


def test_a_consumer_that_stops_early_leaves_no_thread(pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    plans, aligned, factors = open_both(pair)
    before = threading.active_count()
    found = find_in_batches(
        [plan for plan in plans if plan.edit], aligned, factors, device=DEVICE, budget_bytes=300_000
    )
    next(found)
    assert threading.active_count() > before  # control
    found.close()
    assert threading.active_count() == before


def test_only_the_batch_in_work_and_the_next_are_on_the_device(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[weakref.ref[Tensor]] = []
    bring = Stage.bring

    def watched(stage: Stage, tensor: Tensor) -> Tensor:
        there = bring(stage, tensor)
        brought.append(weakref.ref(there))
        return there

    monkeypatch.setattr(Stage, "bring", watched)
    plans, aligned, factors = open_both(pair)
    edited = [plan for plan in plans if plan.edit]
    most = 0
    for plan, tensor, directions in find_in_batches(edited, aligned, factors, device=DEVICE, budget_bytes=300_000):
        directions.find(plan, 0, matrices(tensor)[0])
        time.sleep(0.01)  # the next one arrives meanwhile
        most = max(most, sum(reference() is not None for reference in brought))
    assert 2 <= most <= 4  # both sides of one tensor, or of two
    assert len(brought) == 2 * len(edited)


@pytest.mark.parametrize("device", [None, DEVICE])
def test_each_tensor_where_it_is_or_on_a_device(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], device: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(monkeypatch)
    plans, aligned, factors = open_both(pair)
    edited = [plan for plan in plans if plan.edit]
    seen: dict[str, tuple[bool, list[TensorReport]]] = {}

    def work(plan: TensorPlan, tensor: Tensor, directions: BaseFactors) -> None:
        reports = edit_tensor(plan, tensor, directions, lambda *_: None)
        seen[plan.name] = (tensor.data_ptr() == pair[0][plan.name].data_ptr(), reports)

    each_tensor(work, edited, aligned, factors, device=device, progressbar=False)
    assert set(seen) == {plan.name for plan in edited}
    assert all(itself == (device is None) for itself, _ in seen.values())
    assert [report.name for report in seen["experts.up"][1]] == [f"experts.up[{number}]" for number in range(3)]


def test_threads_work_where_they_are_told(pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    plans, aligned, factors = open_both(pair)
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}

    def work(plan: TensorPlan, tensor: Tensor, _: object) -> None:
        seen[plan.name] = tensor.device.type, tuple(tensor.shape)

    edited = [plan for plan in plans if plan.edit]
    each_tensor(work, edited, aligned, factors, device=torch.device("meta"), progressbar=False)
    assert seen == {plan.name: ("meta", plan.shape) for plan in edited}


def test_a_device_without_float64_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base, aligned = (nn.Sequential(nn.Linear(96, 96)) for _ in range(2))
    before = copy.deepcopy(aligned.state_dict())
    subspace = SafetySubspace.from_models(aligned, base, LoxConfig(r=2))
    monkeypatch.setattr(edit_model, "has_float64", lambda device: device != CPU)  # as on Apple's: none is at hand
    with pytest.raises(UnsupportedModelError, match=r"Sequential.* is on cpu, which has no float64.*model\.to"):
        apply_lox(aligned, LoxConfig(r=2), base_model=base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in aligned.state_dict().items())
    apply_lox(aligned, base_model=subspace)  # nothing is decomposed
    assert not torch.equal(aligned[0].weight, before["0.weight"])


@pytest.mark.parametrize("r", [6, 0.5, None])
def test_a_live_model_is_hardened_where_it_is_and_back(r: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = live_pair()
    before, one_by_one, config = copy.deepcopy(aligned.state_dict()), copy.deepcopy(aligned), LoxConfig(r=r)
    apply_lox(one_by_one, config, base_model=base)
    batches: list[int] = []
    whole = edit_batches.batched_lanczos
    monkeypatch.setattr(
        edit_batches, "batched_lanczos", lambda *args, **kw: batches.append(len(args[0])) or whole(*args, **kw)
    )
    monkeypatch.setattr(edit_model, "in_batches", lambda device: device == CPU)
    apply_lox(aligned, config, base_model=base)
    assert batches == ([4] if r == 6 else [])
    for name, tensor in one_by_one.state_dict().items():
        assert (tensor != aligned.state_dict()[name]).sum() <= 1e-3 * tensor.numel(), name
    assert not torch.equal(aligned[0].weight, before["0.weight"])  # control
    revert_lox(aligned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in aligned.state_dict().items())


@pytest.mark.parametrize("shape", [(300, 40), (3, 50, 40), (16, 3, 3, 3), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_staged_copies_are_equal(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1000)
    tensor = torch.randn(shape).to(dtype)
    stage = Stage(DEVICE)
    for source in (tensor, tensor.mT, tensor[:, ::2], torch.nn.Parameter(tensor.float())):
        there = stage.bring(source)
        assert there.dtype == source.dtype and (there.data_ptr() != source.data_ptr() or not source.numel())
        assert torch.equal(there.float(), source.float()) and not there.requires_grad
    stage.take_over(stage.ready(), [there])
    assert Stage(CPU).bring(tensor) is tensor


def test_buffers_are_on_the_host_whatever_the_default_is() -> None:
    tensor, out = torch.randn(30, 10), torch.empty(30, 10)
    with torch.device("meta"):
        there = Stage(DEVICE).bring(tensor)
        with Drain(DEVICE) as drain:
            drain.rows(slice(0, 30), there, lambda part, rows: out[part].copy_(rows))
    assert torch.equal(there, tensor) and torch.equal(out, tensor)


@pytest.mark.parametrize("shape", [(64, 40), (3, 64, 40)])
def test_float8_with_scales_arrives_as_what_it_stands_for(shape: tuple[int, ...]) -> None:
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    stored = ScaledTensor(codes, torch.rand(*shape[:-2], 2, 2) + 0.5, Blocks(32, 20))
    assert torch.equal(Stage(DEVICE).bring(stored), stored.dense())


def test_rows_arrive_in_order_and_before_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BUFFER_BYTES", 400)
    tile, out = torch.randn(100, 10), torch.empty(200, 10)
    wanted, seen = tile.clone(), list[object]()

    def take(part: slice, rows: Tensor) -> None:
        time.sleep(0.001)
        seen.append(part)
        out[part] = rows

    with Drain(DEVICE) as drain:
        drain.rows(slice(100, 200), tile, take)
        tile.zero_()  # the caller's buffer is its own again
        drain.then(lambda: seen.append("end"))
    assert torch.equal(out[100:], wanted)
    assert seen == [slice(start, start + 10) for start in range(100, 200, 10)] + ["end"]


def test_nothing_is_done_after_a_failure() -> None:
    seen: list[int] = []

    def fail(*_: object) -> None:
        raise OSError("no space")

    def use() -> None:
        with Drain(DEVICE) as drain:
            drain.rows(slice(0, 2), torch.ones(2, 2), fail)
            for number in range(10):
                drain.rows(slice(0, 2), torch.ones(2, 2), lambda *_, number=number: seen.append(number))
                drain.then(lambda: seen.append(-1))

    with pytest.raises(OSError, match="no space"):
        use()
    assert not seen


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == CPU
    for missing in ("cudo", "meta", "cuda:99"):
        with pytest.raises(ConfigError, match="device"):
            resolve_device(missing)
    assert not in_batches(CPU) and not in_batches(torch.device("mps")) and in_batches(torch.device("cuda", 0))
    assert memory_budget(CPU) > 0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_without_an_accelerator_it_is_the_cpu() -> None:
    assert resolve_device() == resolve_device("auto") == CPU
    with pytest.raises(ConfigError, match="no accelerator"):
        resolve_device("cuda")


@pytest.fixture
def two_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says on a machine with two: no such machine is at hand, and only names are resolved."""
    for name, value in {
        "is_available": True,
        "device_count": 2,
        "current_accelerator": torch.device("cuda"),
    }.items():
        monkeypatch.setattr(torch.accelerator, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("two_accelerators")
def test_several_processes_take_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert resolve_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device() == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)  # what is named is taken
    with pytest.raises(ConfigError, match="it has 2"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert resolve_device() == CPU
    with pytest.raises(ConfigError, match="float64"):
        resolve_device("mps")


@pytest.mark.usefixtures("two_accelerators")
@pytest.mark.parametrize(("processes", "gib"), [(None, 4), (1, 4), (2, 4), (3, 2), (4, 2), (8, 1)])
def test_processes_on_one_device_share_its_memory(
    processes: int | None, gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 2**30)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert memory_budget(torch.device("cuda", 1)) == gib * 2**30


def test_the_command_takes_a_device(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, errors = run("subspace", "nowhere", "--base-model", "nowhere-else", "--device", "cuda:99")
    assert code != 0 and "no device 'cuda:99'" in errors  # before any model is looked for


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("base_there", [False, True])
def test_on_an_accelerator(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], base_there: bool
) -> None:
    device = resolve_device()
    plans, aligned, factors = open_both(pair)
    wanted, found = Collect(pair[0]), Collect(pair[0])
    edit_tensors(plans, aligned, factors, wanted, progressbar=False)
    base = {name: tensor.to(device) for name, tensor in pair[1].items()} if base_there else pair[1]
    edit_tensors(
        plans,
        aligned,
        BaseFactors(DictSource(base, "base"), CONFIG, None),
        found,
        device=device,
        progressbar=False,
    )
    for name, tensor in wanted.out.items():
        assert (tensor != found.out[name]).sum() <= 1e-3 * tensor.numel(), name


@pytest.fixture
def tf32() -> Iterator[None]:
    """What training sets for speed: products of float32 round at the third digit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("budget", [1, 1_500_000, 2**30])
@pytest.mark.parametrize("r", [6, 0.5, None])
def test_a_live_model_on_an_accelerator_and_back(
    r: float | None, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_batches, "memory_budget", lambda _: budget)
    base, aligned = live_pair()
    wanted = apply_lox(copy.deepcopy(aligned), LoxConfig(r=r), base_model=base).state_dict()
    there = apply_lox(copy.deepcopy(aligned).to(resolve_device()), LoxConfig(r=r), base_model=base)
    for name, tensor in there.state_dict().items():
        assert (tensor.cpu() != wanted[name]).sum() <= 1e-3 * tensor.numel(), name
    assert not torch.equal(wanted["0.weight"], aligned.state_dict()["0.weight"])  # control
    revert_lox(there)
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor.cpu(), aligned.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("budget", [1, 1_500_000, 2**30])
@pytest.mark.parametrize("model_there", [False, True])
@pytest.mark.parametrize("device", ["auto", "cpu", None])
def test_a_subspace_is_found_on_a_device_and_lies_with_the_model(
    device: str | None, model_there: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_batches, "memory_budget", lambda _: budget)
    base, aligned = live_pair()
    wanted = SafetySubspace.from_models(aligned, base, CONFIG)
    home = resolve_device() if model_there else CPU
    found = SafetySubspace.from_models(aligned.to(home), base, CONFIG, device=device, progressbar=False)
    assert found.factors.keys() == wanted.factors.keys()
    for name, factors in found.factors.items():
        assert {part.device for part in (factors.U, factors.S, factors.Vh)} == {home}
        one, other = factors.to(CPU), wanted.factors[name]
        assert torch.allclose(one.S, other.S, rtol=1e-5)
        assert (one.dense() - other.dense()).norm() < 1e-3 * other.S.norm()
        assert torch.allclose(found.base_coordinates[name].diag(), wanted.base_coordinates[name].diag(), atol=1e-3)
