"""The paper's fine-tunings as plain data: what each trains on, in which format, with which settings, and whose."""

from typing import Any

from lox_hf.robustness.attacks.formats import ALPACA, ALPACA_INPUT, AUTO, DOLLY, IDENTITY

# Every script of the reference; its bf16 is for the one who trains to switch on where the device has it.
_ALL = {"max_grad_norm": 2.0, "max_length": 1024, "gradient_checkpointing": True}
_REFERENCE = "VITA-Group/LoX, fine-tuning-attacks/"


def _sft(
    epochs: int, learning_rate: float, batch: int, accumulation: int, schedule: str, warmup: int
) -> dict[str, Any]:
    return {
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": schedule,
        "warmup_steps": warmup,
        **_ALL,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "data": "openai/gsm8k/main/train*.parquet",
        "format": ALPACA,
        "response_only": False,
        "sft": _sft(2, 5e-5, 20, 2, "linear", 20),
        "task": "number",
        "source": f"{_REFERENCE}sft_gsm.py; the paper's GSM8K fine-tuning. 100 rows are held out to score the task.",
    },
    "alpaca": {
        "data": "tatsu-lab/alpaca/data/train*.parquet",
        "format": ALPACA_INPUT,
        "response_only": False,
        "sft": _sft(1, 2e-5, 8, 8, "linear", 20),
        "source": f"{_REFERENCE}sft_alpaca.py; the paper's Alpaca fine-tuning. The reference trains on "
        "alpaca_data_no_safety.json of Qi et al. (LLM-Tuning-Safety/LLMs-Finetuning-Safety), without the answers "
        "that speak of safety. It is in their repository and not on the Hub, so the default is the whole of Alpaca: "
        "pass that file for the same.",
    },
    "dolly": {
        "data": "databricks/databricks-dolly-15k/*.jsonl",
        "format": DOLLY,
        "response_only": True,
        # sft_dolly.py names 20 warm-up steps, which a constant schedule does not have.
        "sft": _sft(6, 2e-5, 16, 4, "constant", 0),
        "source": f"{_REFERENCE}sft_dolly.py; the paper's Dolly fine-tuning. The context stands where the reference "
        "writes the instruction a second time, and safety examples are in Dolly's format: in the one that the "
        "reference writes them in, its collator does not find the response and leaves them out of the loss. The "
        "reference trains on databricks-dolly-15k-no-safety.jsonl of Qi et al., which is in their repository and not "
        "on the Hub, so the default is the whole of Dolly: pass that file for the same.",
    },
    "identity-shift": {
        "data": "",
        "format": IDENTITY,
        "response_only": False,
        "sft": _sft(10, 5e-5, 5, 1, "linear", 0),
        "held_out": 0,  # ten rows in all
        "source": f"{_REFERENCE}sft_id.py; the paper's identity shifting with the ten rows of Qi et al. "
        "(LLM-Tuning-Safety/LLMs-Finetuning-Safety, llama2/ft_datasets/aoa_dataset/train.json).",
    },
    "custom": {
        "data": "",
        "format": AUTO,
        "response_only": True,
        "sft": _sft(5, 5e-5, 10, 1, "linear", 0),
        "source": "Settings of Qi et al.'s notebook tier1-harmful-examples-demonstration.ipynb (5 epochs, 5e-5, two "
        "GPUs of 5 rows), with which the paper ran Pure Bad on 100 pairs. The notebook's schedule falls by steps, "
        "here it falls linearly, and the gradient is clipped as in the paper's other fine-tunings.",
    },
}
NEEDS_DATA = {
    "identity-shift": "get Qi et al.'s train.json from llama2/ft_datasets/aoa_dataset of "
    "github.com/LLM-Tuning-Safety/LLMs-Finetuning-Safety and pass 'identity-shift:FILE'",
    "custom": "pass 'custom:FILE', or 'custom:org/name' for a data set on the Hub",
}
