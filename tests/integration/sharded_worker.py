"""What every process of tests/integration/test_sharded.py does: `torchrun sharded_worker.py SCENE FOLDER`.

Each process leaves what it saw in FOLDER/<rank>.pt; the test compares them with each other and with one process.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lox_hf import LoxConfig, apply_lox, hardening_report, revert_lox
from lox_hf.errors import LoxError

INPUTS = torch.arange(2, 10)[None]
CONFIGS = {
    "rank": LoxConfig(r=4, alpha=1.25),
    "energy": LoxConfig(r=0.5, alpha=0.5),
    "full": LoxConfig(r=None, alpha=0.5),
    "exact": LoxConfig(r=4, alpha=1.25, svd="exact"),
}
EMBEDDING, HEAD, Q_PROJ, DOWN = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)
SIZES = {
    "vocab_size": 6001,  # times 99 columns: enough for a start on a sample of the rows
    "hidden_size": 99,
    "head_dim": 8,
    "intermediate_size": 131,
    "num_hidden_layers": 2,
    "num_attention_heads": 11,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
"""A Llama whose sizes no number of processes divides; k_proj is small, and decomposed exactly."""


@torch.no_grad()
def make_pair(folder: Path, dtype: torch.dtype, **sizes: Any) -> None:
    """Write a base and an aligned model: a change of falling singular values, and of a few rows of the embedding."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).to(dtype)
    model.save_pretrained(folder / "base")
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            rows = 40 if name == EMBEDDING else len(weight)
            left, right = (torch.randn(size, 12, generator=generator) for size in (rows, weight.shape[1]))
            noise = torch.randn(rows, len(right), generator=generator)
            change = (left * 0.5 ** torch.arange(12)) @ right.T + 0.01 * noise
            weight[-rows:] += (0.02 * change).to(dtype)
    model.save_pretrained(folder / "aligned")


def refusal(call: Callable[[], Any]) -> str:
    """The message of the error that a call has to raise."""
    try:
        call()
    except LoxError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def pieces_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what this process holds, the optimiser's copy included."""
    from lox_hf.edit.spread import pieces
    from lox_hf.weights.spread.model import SpreadSource

    source, found = SpreadSource(model, "model"), {}
    for name, info in source.infos().items():
        if len(info.shape) == 2:
            for (_, number), view in pieces(name, source.get(name)).items():
                found[f"{name} {number}"] = view.clone()
    return found


def whole_of(model: nn.Module) -> dict[str, Tensor]:
    """The whole of every matrix."""
    from lox_hf.weights.spread.model import SpreadSource

    source = SpreadSource(model, "model")
    return {name: source.get(name).dense().clone() for name, info in source.infos().items() if len(info.shape) == 2}


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    one, other = bits(one), bits(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def harden(model: Any, folder: Path) -> dict[str, Any]:
    """Harden and take back with every setting."""
    seen: dict[str, Any] = {}
    before = pieces_of(model)
    for label, config in CONFIGS.items():
        apply_lox(model, config, base_model=folder / "base")
        report = hardening_report(model)
        seen[label] = {
            "whole": whole_of(model),
            "changed": not same(pieces_of(model), before),
            "tensors": {t.name: (t.rank, t.method, t.energy_share, t.delta_norm) for t in report.tensors},
            "stamped": getattr(model.config, "lox_config", None) is not None,
        }
        revert_lox(model)
        seen[label]["reverted"] = same(pieces_of(model), before)
    return seen


def load(folder: Path, **layout: int) -> Any:
    """Load the aligned model in pieces."""
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder / "aligned", dtype="auto", distributed_config=DistributedConfig(**layout)
    )


def fsdp(folder: Path) -> dict[str, Any]:
    return {**harden(load(folder, fsdp_size=2), folder), "after a pass": _after_a_pass()}


@torch.no_grad()
def _after_a_pass() -> Tensor:
    """A forward pass alone leaves the weights of the outermost module whole, and what is written there is lost."""
    from torch.distributed.fsdp import fully_shard

    model: Any = nn.Sequential(nn.Linear(6, 5, bias=False))
    model[0].weight.copy_(torch.arange(30.0).view(5, 6))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    model(torch.ones(1, 6))
    apply_lox(model, LoxConfig(r=None, alpha=0.5), base_model={"0.weight": torch.zeros(5, 6)})
    model.reshard()
    return model[0].weight.full_tensor()


def meshes(folder: Path) -> dict[str, Any]:
    """Tensor parallelism beside copies and FSDP2, and FSDP2 in two copies, on four processes."""
    layouts = {
        "tp": {"tp_size": 4},
        "fsdp x tp": {"fsdp_size": 2, "tp_size": 2},
        "hsdp": {"dp_replicate_size": 2, "fsdp_size": 2},
    }
    seen: dict[str, Any] = {}
    for label, layout in layouts.items():
        model = load(folder, **layout)
        kinds = {str(getattr(weight, "placements", "plain")) for weight in model.parameters() if weight.ndim == 2}
        seen[label] = {**harden(model, folder), "kinds": kinds}
    return seen


def subspace(folder: Path) -> dict[str, Any]:
    """The directions of a model in pieces as an artefact, and an edit with them; a callback that finds its own."""
    from lox_hf import SafetySubspace

    model = load(folder, fsdp_size=2)
    found = SafetySubspace.from_models(model, folder / "base", CONFIGS["rank"])
    apply_lox(model, CONFIGS["rank"], base_model=found)
    return {
        "factors": {name: [item.U, item.S, item.Vh] for name, item in found.factors.items()},
        "coordinates": dict(found.base_coordinates),
        "whole": whole_of(model),
    }


@torch.no_grad()
def faults(folder: Path) -> dict[str, Any]:
    """One process alone has a NaN, or no base; other ways of use that are refused."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from transformers import MixtralConfig, MixtralForCausalLM

    rank = dist.get_rank()
    model = load(folder, fsdp_size=2)
    base = folder / "base"
    seen = {
        "no base": refusal(lambda: apply_lox(model, CONFIGS["rank"], base_model=base if rank == 0 else base / "none")),
        "spread base": refusal(lambda: apply_lox(model, CONFIGS["rank"], base_model=model)),
        "spread state": refusal(lambda: apply_lox(model, CONFIGS["rank"], base_model=model.state_dict())),
        "other settings": refusal(lambda: apply_lox(model, LoxConfig(r=4 + rank), base_model=base)),
        "other base": refusal(
            lambda: apply_lox(model, CONFIGS["rank"], base_model=folder / ("base" if rank == 0 else "other"))
        ),
        "not hardened": refusal(lambda: revert_lox(model)),
    }
    local = dict(model.named_parameters())[Q_PROJ].to_local()
    kept = local[0, 0].clone()
    for label in ("rank", "full", "exact"):
        if rank == 1:
            local[0, 0] = torch.nan
        before = pieces_of(model)
        seen[f"nan {label}"] = refusal(partial(apply_lox, model, CONFIGS[label], base_model=base))
        seen[f"nan {label} put back"] = same(before, pieces_of(model))
    local[0, 0] = kept
    apply_lox(model, CONFIGS["rank"], base_model=base)
    if rank == 1:
        local[0, 0] += 1
    seen["changed since"] = refusal(lambda: revert_lox(model))

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    few = MixtralConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, **heads)
    experts: Any = MixtralForCausalLM(few)
    fully_shard(experts, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    seen["experts"] = refusal(lambda: apply_lox(experts, CONFIGS["rank"], base_model={}))

    partly: Any = AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype="auto")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parallelize_module(partly, mesh, {Q_PROJ.removesuffix(".weight"): ColwiseParallel()})
    seen["partly"] = harden(partly, folder)
    return seen


def lost(folder: Path) -> dict[str, Any]:
    """One process ends while both harden."""
    from lox_hf import apply

    model = load(folder, fsdp_size=2)
    before = pieces_of(model)
    edits: list[str] = []

    def end_at_the_fifth(plan: Any, *args: Any) -> Any:
        edits.append(plan.name)
        if dist.get_rank() == 1 and len(edits) == 5:
            torch.save({}, folder / "1.pt")
            os._exit(0)
        return edit_spread(plan, *args)

    edit_spread, apply.edit_spread = apply.edit_spread, end_at_the_fifth
    started = time.monotonic()
    said = refusal(lambda: apply_lox(model, CONFIGS["rank"], base_model=folder / "base"))
    seconds = time.monotonic() - started
    seen = {"said": said, "edits": len(edits), "seconds": seconds, "put back": same(before, pieces_of(model))}
    torch.save(seen, folder / "0.pt")
    os._exit(0)


def zero(folder: Path) -> dict[str, Any]:
    """ZeRO-3 before the engine exists, and after it: then steps begin from the optimiser's copy."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo")
    is_bfloat16 = LlamaConfig.from_pretrained(folder / "aligned").dtype == torch.bfloat16
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 9000},  # smaller ones stay whole
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True, "weight_decay": 0.0}},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_bfloat16},
    }
    held = HfDeepSpeedConfig(settings)  # from_pretrained partitions as long as this lives
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype="auto")
    seen = harden(model, folder)
    engine = deepspeed.initialize(model=model, config=settings)[0]
    _step(engine)  # from now on DeepSpeed keeps small weights whole
    seen["whole between uses"] = sum(weight.ds_status.name == "AVAILABLE" for weight in matrices_of(model).values())
    seen["engine"] = harden(engine.module, folder)
    apply_lox(engine.module, CONFIGS["rank"], base_model=folder / "base")
    weights = pieces_of(model)
    seen["masters"] = sum(not int(name.rpartition(" ")[2]) % 2 == 0 for name in weights)
    seen["in use"] = _gathered(model, whole_of(model))  # now: a step refreshes it
    _step(engine)
    seen["kept by a step"] = same(weights, pieces_of(model))
    seen["held"] = held.is_zero3()
    seen["offloaded"], seen["added"] = _offloaded(folder, settings)
    return seen


def _step(engine: Any) -> None:
    engine.backward(engine(input_ids=INPUTS, labels=INPUTS).loss)
    engine.step()


def matrices_of(model: nn.Module) -> dict[str, Any]:
    """The parameters of two sides under ZeRO-3."""
    return {name: weight for name, weight in model.named_parameters() if len(weight.ds_shape) == 2}


def _offloaded(folder: Path, settings: dict[str, Any]) -> tuple[str, Tensor]:
    """An optimiser that keeps its copy elsewhere: an edit that can be taken back is refused, a correction is kept."""
    import deepspeed

    from lox_hf.weights.spread.model import SpreadSource

    stage = {**settings["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype="auto")
    engine = deepspeed.initialize(model=model, config={**settings, "zero_optimization": stage})[0]
    said = refusal(lambda: apply_lox(model, CONFIGS["rank"], base_model=folder / "base"))
    matrix = SpreadSource(model, "model").get(Q_PROJ)
    before = matrix.dense().clone()
    matrix.add(torch.ones(matrix.shape[0], 1), torch.ones(1, matrix.shape[1]))
    _step(engine)
    return said, matrix.dense() - before


def _gathered(model: nn.Module, wholes: dict[str, Tensor]) -> bool:
    """Whether DeepSpeed gives the forward pass what the pieces say, also where it keeps the whole between uses."""
    from deepspeed.runtime.zero import GatheredParameters

    equal = []
    for name, weight in matrices_of(model).items():
        with GatheredParameters([weight]):
            equal.append(torch.equal(weight.data, wholes[name]))
    return all(equal)


def pieces(folder: Path) -> dict[str, Any]:
    """Matrices of hard shapes in every placement, and under ZeRO-3: the directions of a change, and an edit."""
    import deepspeed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    deepspeed.init_distributed("gloo")
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    kinds = [Replicate(), Shard(0), Shard(1)]
    layouts = [(line, (kind,)) for kind in kinds] + [(square, (a, b)) for a in kinds for b in kinds]
    layouts.append((square, (_StridedShard(0, split_factor=2), Shard(0))))  # FSDP2 over tensor parallelism
    layouts.append((square, (_StridedShard(1, split_factor=2), Shard(1))))
    seen: dict[str, Any] = {}
    for shape in SHAPES:
        base, whole = pair_of(shape)
        for mesh, placements in layouts:
            weight = distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)
            seen[f"{shape} {placements}"] = _piece(weight, base)
        with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 4, "zero_optimization": {"stage": 3}}):
            holder = nn.Linear(shape[1], shape[0], bias=False)
        with deepspeed.zero.GatheredParameters([holder.weight], modifier_rank=0):
            holder.weight.data.copy_(whole)
        seen[f"{shape} zero"] = _piece(holder.weight, base)
    return seen


SHAPES = [(8, 6), (13, 7), (3, 9), (9, 1), (1, 2), (2, 50), (150, 70), (90, 131)]


def pair_of(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix before and after a change of few directions."""
    generator = torch.Generator().manual_seed(shape[0])
    base, left, right = (torch.randn(size, generator=generator) for size in (shape, (shape[0], 4), (4, shape[1])))
    return base, base + left * torch.tensor([1.0, 0.5, 0.2, 0.01]) @ right


@torch.no_grad()
def _piece(weight: Tensor, base: Tensor) -> dict[str, Any]:
    from lox_hf.core.lowrank import decompose
    from lox_hf.weights.spread.model import spread_matrix

    matrix = spread_matrix(weight)
    _, rows = matrix.row_share()
    found = decompose(matrix.delta(base, cast_base=False), 3)
    factors = found.factors
    held = sum(block.view.numel() for block in matrix.blocks())
    before = matrix.coordinates(factors)
    matrix.add(0.5 * factors.U, factors.Vh)
    return {
        "rows": rows.shape[0],
        "held": held,
        "factors": [factors.U, factors.S, factors.Vh],
        "method": found.method,
        "before": before,
        "after": matrix.coordinates(factors),
        "dense": matrix.dense().clone(),
        "bad": _spoilt(matrix, base),
    }


def _spoilt(matrix: Any, base: Tensor) -> set[str]:
    """What is said when one process alone holds a NaN."""
    from lox_hf.core.lowrank import decompose

    if dist.get_rank() == 0:
        matrix.blocks()[0].view[:1, :1].fill_(torch.nan)
    delta = matrix.delta(base, cast_base=False)
    return {refusal(lambda: decompose(delta, 3)), refusal(lambda: matrix.coordinates(_NO_DIRECTIONS(*matrix.shape)))}


def _NO_DIRECTIONS(rows: int, columns: int) -> Any:
    from lox_hf.core.lowrank import LowRank

    return LowRank(torch.ones(rows, 1), torch.ones(1), torch.ones(1, columns))


SCENES = {scene.__name__: scene for scene in (fsdp, meshes, subspace, faults, lost, zero, pieces)}


def main() -> None:
    scene, folder = sys.argv[1], Path(sys.argv[2])
    if not dist.is_initialized() and scene not in ("zero", "pieces"):  # DeepSpeed sets up its own
        dist.init_process_group("gloo")
    seen = SCENES[scene](folder)
    torch.save(seen, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
