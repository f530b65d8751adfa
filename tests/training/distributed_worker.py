"""What every process of tests/training/test_distributed.py does: `torchrun distributed_worker.py SCENE FOLDER`.

Each process leaves what it saw in FOLDER/<rank>.pt; the test compares them with each other and with one process.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lox_hf.core.lowrank import LowRank
from lox_hf.errors import LoxError

INPUTS = torch.arange(2, 10)[None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ, GATE, FROZEN, CONTROL = (
    f"model.layers.{layer}.{module}.weight"
    for layer, module in [(0, "self_attn.q_proj"), (1, "mlp.gate_proj"), (0, "mlp.down_proj"), (1, "mlp.up_proj")]
)


def directions_of(name: str, shape: tuple[int, int], k: int = 3) -> LowRank:
    """Orthonormal directions that every process, and the test, makes alike."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    left, right = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in shape)
    return LowRank(left, torch.ones(k), right.T.contiguous())


def change_of(name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What `add` adds: 0.5 along each direction, so that the coordinates grow by the identity / 2."""
    directions = directions_of(name, shape)
    return 0.5 * directions.U, directions.Vh


def coordinates_of(weights: Any) -> dict[str, Tensor]:
    """The reading of every matrix."""
    return {name: matrix.coordinates(directions_of(name, matrix.shape)) for name, matrix in weights.matrices.items()}


def add(weights: Any, *names: str) -> None:
    """Add to these matrices."""
    weights.add({name: change_of(name, weights.matrices[name].shape) for name in names})


def refusal(call: Callable[[], Any]) -> str:
    """The message of the error that a call has to raise."""
    try:
        call()
    except LoxError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


# --- pieces: DTensors of every placement, on four processes ---------------------------------------------------------


def pieces() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    from lox_hf.training.backends.sharded import ShardedMatrix

    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    kinds = [Replicate(), Shard(0), Shard(1)]
    layouts = [(line, (kind,)) for kind in kinds] + [(square, (a, b)) for a in kinds for b in kinds]
    layouts.append((square, (_StridedShard(0, split_factor=2), Shard(0))))  # FSDP2 over tensor parallelism
    seen: dict[str, Any] = {}
    for shape in [(8, 6), (13, 7), (3, 9), (9, 1), (1, 2)]:
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for mesh, placements in layouts:
            label = f"{shape} {placements}"
            weight = nn.Parameter(distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None))
            matrix = ShardedMatrix(weight)
            directions = directions_of(label, shape, k=min(2, *shape))
            before = matrix.coordinates(directions)
            matrix.add(0.5 * directions.U, directions.Vh)
            seen[label] = {
                "whole": whole,
                "size": weight.to_local().numel(),
                "before": before,
                "after": matrix.coordinates(directions),
                "dense": matrix.dense().clone(),  # where nothing is in pieces it is the weight itself
                "bad": _spoilt(matrix, directions),
            }
    return seen


@torch.no_grad()
def _spoilt(matrix: Any, directions: LowRank) -> str:
    """What a reading says when one process alone holds a NaN."""
    if dist.get_rank() == 0:
        matrix.weight.to_local()[:1, :1].fill_(math.nan)
    return refusal(lambda: matrix.coordinates(directions))


# --- training: a real Trainer on two processes ----------------------------------------------------------------------


def fsdp(folder: Path) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from lox_hf.training.backends import open_weights

    flat = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4)), device_id=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(fsdp_size=2))
    seen = train(model, folder, _arguments(folder))
    seen["fsdp 1"] = refusal(lambda: open_weights(flat))
    return seen


def zero(folder: Path, stage: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": stage == 2},  # so that what the forward pass uses is not what the optimiser keeps
    }
    arguments = _arguments(folder, deepspeed=settings, bf16=stage == 2)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    dict(model.named_parameters())[FROZEN].requires_grad_(requires_grad=False)
    return train(model, folder, arguments)


def _arguments(folder: Path, **settings: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder / "out"),
        max_steps=3,
        per_device_train_batch_size=1,
        learning_rate=1e-6,  # steps are visible, but far smaller than what `add` does
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        ddp_backend="gloo",
        **settings,
    )


def train(model: Any, folder: Path, arguments: Any) -> dict[str, Any]:
    """Add to matrices before training, at step 1 and at step 3; read before and after, and what comes of it."""
    from transformers import Trainer, TrainerCallback

    from lox_hf.training.backends import open_weights

    seen: dict[str, Any] = {}

    class Edits(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weights = open_weights(model)
            seen[f"step {state.global_step}"] = coordinates_of(weights)
            if state.global_step == 2:
                return
            add(weights, Q_PROJ, GATE, FROZEN)
            if state.global_step == 1:
                _edit_in_place(weights.matrices[CONTROL])
            seen[f"step {state.global_step} edited"] = coordinates_of(weights)

    before = open_weights(model)
    seen["kinds"] = {name: type(matrix).__name__ for name, matrix in before.matrices.items()}
    seen["loaded"] = coordinates_of(before)
    add(before, Q_PROJ)
    data = [{"input_ids": INPUTS[0], "labels": INPUTS[0]} for _ in range(8)]
    trainer: Any = Trainer(model, arguments, train_dataset=data, callbacks=[Edits()])
    trainer.train()
    seen["logits"] = _logits(trainer)
    seen["parameters after evaluation"] = {name: type(p).__name__ for name, p in trainer.model.named_parameters()}
    weights = open_weights(trainer.model)
    seen["kinds after evaluation"] = {name: type(matrix).__name__ for name, matrix in weights.matrices.items()}
    add(weights, HEAD if HEAD in weights.matrices else EMBEDDING)
    seen["logits edited"] = _logits(trainer)
    seen["end"] = coordinates_of(weights)
    seen["dense"] = {name: matrix.dense() for name, matrix in weights.matrices.items()}
    trainer.save_model(str(folder / "saved"))
    return seen


@torch.no_grad()
def _edit_in_place(matrix: Any) -> None:
    """The control: the same change, but only to what the forward pass uses."""
    from lox_hf.training.backends.matrix import add_product

    change = change_of(CONTROL, matrix.shape)
    if hasattr(matrix.weight, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([matrix.weight], modifier_rank=0):
            add_product(matrix.weight.data, *change)
    elif type(matrix).__name__ == "ZeroMatrix":
        add_product(matrix.weight.data, *change)


@torch.no_grad()
def _logits(trainer: Any) -> Tensor:
    trainer.model.eval()
    found = trainer.model(input_ids=INPUTS).logits
    return getattr(found, "full_tensor", lambda: found)().float()


def main() -> None:
    scene, folder = sys.argv[1], Path(sys.argv[2])
    if not dist.is_initialized() and not scene.startswith("zero"):  # DeepSpeed sets up its own
        dist.init_process_group("gloo")
    if scene == "pieces":
        seen = pieces()
    elif scene == "fsdp":
        seen = fsdp(folder)
    else:
        seen = zero(folder, int(scene.removeprefix("zero")))
    torch.save(seen, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
