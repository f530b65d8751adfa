"""What every process of tests/training/test_distributed.py does: `torchrun distributed_worker.py SCENE FOLDER`.

Each process leaves what it saw in FOLDER/<rank>.pt; the test compares them with each other and with one process.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from lox_hf import LoxCallback
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


def _zero_settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": stage == 2},  # so that what the forward pass uses is not what the optimiser keeps
    }


def zero(folder: Path, stage: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    arguments = _arguments(folder, deepspeed=_zero_settings(stage), bf16=stage == 2)
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
    from transformers import Trainer

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
    from lox_hf.core.combine import add_product

    change = change_of(CONTROL, matrix.shape)
    if hasattr(matrix.weight, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([matrix.weight], modifier_rank=0):
            add_product(matrix.weight.data, *change)
    elif type(matrix).__name__ == "SteppedMatrix":
        add_product(matrix.weight.data, *change)


@torch.no_grad()
def _logits(trainer: Any) -> Tensor:
    trainer.model.eval()
    found = trainer.model(input_ids=INPUTS).logits
    return getattr(found, "full_tensor", lambda: found)().float()


# --- callback: a `LoxCallback` in trainings on two processes --------------------------------------------------------

STOP_BELOW = 0.92


def callback(folder: Path, backend: str) -> dict[str, Any]:
    """Train four steps that undo an alignment: watched, resumed in the middle, stopped, brought back, and hardened."""
    from training.callback_runs import CONFIG

    subspace = str(folder / "subspace")
    seen = {
        "log": _watched(folder, backend, "log", LoxCallback(subspace, every_n_steps=1)),
        "stop": _watched(folder, backend, "stop", LoxCallback(subspace, "stop", below=STOP_BELOW, every_n_steps=1)),
        "reapply": _watched(folder, backend, "reapply", LoxCallback(subspace, "reapply", every_n_steps=2)),
        "found": _watched(folder, backend, "found", LoxCallback(CONFIG, base_model=folder / "base", every_n_steps=1)),
        "after": _watched(folder, backend, "after", LoxCallback(CONFIG, harden_after=True)),
    }
    if backend == "zero3":  # the Trainer refuses to resume what transformers has sharded, and accelerate needs a GPU
        again, checkpoint = LoxCallback(subspace, every_n_steps=1), str(folder / "log" / "checkpoint-2")
        seen["resumed"] = _watched(folder, backend, "log", again, resume=checkpoint)
    else:
        seen["lora"] = _refreshed(folder)
    return seen


@torch.no_grad()
def _refreshed(folder: Path) -> dict[str, Any]:
    """Read a model under LoRA whose base is in pieces, by matrices of its beginning and by fresh ones."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from lox_hf.training.backends import open_weights

    base: Any = AutoModelForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(fsdp_size=2)
    )
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    weights = open_weights(model)
    directions = {name: directions_of(name, matrix.shape) for name, matrix in weights.matrices.items()}

    def read(of: Any) -> dict[str, Tensor]:
        return {name: of.matrices[name].coordinates(along) for name, along in directions.items()}

    def cut() -> list[bool]:
        return [hasattr(weight, "placements") for name, weight in model.named_parameters() if "lora" not in name]

    seen: dict[str, Any] = {"before": read(weights)}
    known = {name: matrix._known[2] for name, matrix in weights.matrices.items()}  # type: ignore[attr-defined]
    weights.add({name: change_of(name, weights.matrices[name].shape) for name in (Q_PROJ, GATE)})  # GATE has no LoRA
    model(input_ids=INPUTS)
    seen["cut after a pass"] = all(cut())
    weights.refresh()
    seen["cut"] = all(cut())
    seen["after"], seen["fresh"] = read(weights), read(open_weights(model))
    seen["kept"] = all(matrix._known[2] is known[name] for name, matrix in weights.matrices.items())  # type: ignore[attr-defined]
    return seen


class _Counts(TrainerCallback):
    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)


def _watched(folder: Path, backend: str, run: str, watch: Any, resume: str | None = None) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers.distributed import DistributedConfig

    from lox_hf.training.backends import open_weights
    from robustness.trainable import make_rows, make_tokenizer
    from training.callback_runs import SETTINGS

    changes: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "ddp_backend": "gloo"}
    if backend == "zero3":
        changes["deepspeed"] = _zero_settings(3)
    else:  # of what is sharded as it is loaded
        changes["save_only_model"] = True
    arguments = TrainingArguments(str(folder / run), **{**SETTINGS, **changes})
    spread = {} if backend == "zero3" else {"distributed_config": DistributedConfig(fsdp_size=2)}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **spread)
    rows: Any = make_rows()
    collator = DataCollatorForSeq2Seq(make_tokenizer())
    trainer: Any = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    watch.attach(trainer)
    steps: list[int] = []
    trainer.add_callback(_Counts(steps))
    trainer.train(resume_from_checkpoint=resume)
    if run == "after":
        trainer.save_model(str(folder / run / "saved"))
    kinds = {type(matrix).__name__ for matrix in open_weights(trainer.model).matrices.values()}
    found = [reading.figures() | {"step": reading.step} for reading in watch.readings]
    files = sorted(path.name for path in (folder / run).glob("checkpoint-*"))
    safe = watch.last_safe_checkpoint
    seen = {"kinds": kinds, "steps done": steps, "step": trainer.state.global_step, "readings": found}
    return seen | {"files": files, "safe": safe and safe.name}


def main() -> None:
    scene, folder = sys.argv[1], Path(sys.argv[2])
    if not dist.is_initialized() and "zero" not in scene:  # DeepSpeed sets up its own
        dist.init_process_group("gloo")
    if scene == "fsdp":
        seen = fsdp(folder)
    elif scene.startswith("callback"):
        seen = callback(folder, scene.split()[1])
    else:
        seen = zero(folder, int(scene.removeprefix("zero")))
    torch.save(seen, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
