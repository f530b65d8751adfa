"""Bad input gets a clear error with its remedy, and nothing is lost: inputs as they were, and no output."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import zoo
from lox_hf import (
    AlreadyHardenedError,
    CheckpointError,
    ConfigError,
    LoxConfig,
    LoxError,
    NumericsError,
    PairingError,
    SafetySubspace,
    UnsupportedModelError,
    apply_lox,
    extract_lox_adapter,
    get_lox_model,
    harden_checkpoint,
)

Tensors = dict[str, Tensor]
Q, UP, EMBEDDING, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> zoo.Pair:
    return zoo.save_pair("llama", tmp_path_factory.mktemp("template"), max_shard_size="60KB")


@pytest.fixture
def pair(template: zoo.Pair, tmp_path: Path) -> zoo.Pair:
    """A pair to damage."""
    shutil.copytree(template.aligned_dir.parent, tmp_path / "pair")
    return zoo.Pair("llama", tmp_path / "pair" / "aligned", tmp_path / "pair" / "base", template.dtype, template.seed)


def config_of(pair: zoo.Pair, **settings: Any) -> LoxConfig:
    return LoxConfig(**{"base_model_name_or_path": str(pair.base_dir), "r": 2, **settings})


def harden(pair: zoo.Pair, name: str = "out", **settings: Any) -> Tensors:
    """Control: what is refused otherwise goes through."""
    output = pair.aligned_dir.parent.parent / name
    harden_checkpoint(pair.aligned_dir, output, config_of(pair, **settings))
    return zoo.read_checkpoint(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def nothing_lost(folder: Path) -> Iterator[None]:
    """Everything under the folder is afterwards as it was, byte for byte, and nothing is new."""
    before = contents(folder)
    yield
    assert contents(folder) == before
    assert not list(folder.rglob(".*.lox-partial"))


def refused(pair: zoo.Pair, error: type[LoxError], match: str, **settings: Any) -> str:
    """The message with which the pair is refused, disk to disk and as an adapter."""
    root = pair.aligned_dir.parent.parent
    with nothing_lost(root), pytest.raises(error, match=match) as caught:
        harden_checkpoint(pair.aligned_dir, root / "out", config_of(pair, **settings))
    if settings.get("r", 2) is not None:
        with nothing_lost(root), pytest.raises(LoxError):
            extract_lox_adapter(pair.aligned_dir, root / "adapter", config_of(pair, **settings))
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change a checkpoint's tensors; they come back as one file."""
    tensors = zoo.read_checkpoint(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@contextmanager
def model_kept(model: torch.nn.Module) -> Iterator[None]:
    """The model is afterwards as it was, bit for bit, and carries no stamp."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert zoo.same_bits(model.state_dict(), before)
    assert not hasattr(model.config, "lox_config")


def test_the_pair_is_good_before_it_is_damaged(pair: zoo.Pair) -> None:
    """Control for everything below."""
    assert not zoo.same_bits(harden(pair), pair.aligned())


def test_every_mismatch_is_listed_at_once(pair: zoo.Pair) -> None:
    def damage(tensors: Tensors) -> None:
        del tensors[UP], tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.zeros(4, 4, dtype=torch.bfloat16)
        tensors[Q] = tensors[Q][:, :48]
        tensors[HEAD] = tensors[HEAD].float()

    rewrite(pair.base_dir, damage)
    message = refused(pair, PairingError, "^Cannot pair aligned '.*/aligned' with base '.*/base': 5 tensors differ")
    for part in (
        f"{UP}: missing in base",
        "model.norm.weight: missing in base",
        "model.extra.weight: (4, 4), only in base",
        f"{Q}: (96, 96) against (96, 48);",
        f"{HEAD}: bfloat16 against float32 [another dtype: pass cast_base=True",
    ):
        assert part in message, part
    live = load(pair.aligned_dir)
    with model_kept(live), pytest.raises(PairingError, match="5 tensors differ"):
        apply_lox(live, config_of(pair))


def test_a_resized_vocabulary_and_its_remedy(pair: zoo.Pair) -> None:
    rewrite(pair.base_dir, lambda t: t.update({name: t[name][:160] for name in (EMBEDDING, HEAD)}))
    message = refused(pair, PairingError, r"embed_tokens.weight: \(192, 96\) against \(160, 96\) \[resized vocabulary")
    remedies = set(re.findall(r"exclude_modules=(\[.*?\])", message))
    assert len(remedies) == 1 and message.count("[resized vocabulary") == 2
    hardened, aligned = harden(pair, exclude_modules=json.loads(remedies.pop())), pair.aligned()
    changed = {name for name in aligned if not torch.equal(hardened[name], aligned[name])}
    assert EMBEDDING not in changed and HEAD not in changed and Q in changed


def test_another_width_of_a_layer_is_no_resized_vocabulary(pair: zoo.Pair) -> None:
    rewrite(pair.base_dir, lambda t: t.update({UP: t[UP][:100]}))
    assert "[resized" not in refused(pair, PairingError, r"up_proj.weight: \(144, 96\) against \(100, 96\)")


def test_another_dtype_and_its_remedy(pair: zoo.Pair) -> None:
    expected = harden(pair, "same dtype")
    rewrite(pair.base_dir, lambda t: t.update({name: tensor.float() for name, tensor in t.items()}))
    refused(pair, PairingError, "16 tensors differ.*bfloat16 against float32.*cast_base=True")
    assert zoo.same_bits(harden(pair, cast_base=True), expected)


def test_another_architecture(pair: zoo.Pair, tmp_path: Path) -> None:
    other = zoo.save_pair("gpt2", tmp_path / "gpt2")
    refused(pair, PairingError, "aligned is 'llama', base is 'gpt2'", base_model_name_or_path=str(other.base_dir))
    model = load(pair.aligned_dir)
    with model_kept(model), pytest.raises(PairingError, match="different architectures"):
        apply_lox(model, LoxConfig(r=2), base_model=load(other.base_dir))


def test_a_base_that_equals_the_aligned_model(pair: zoo.Pair) -> None:
    shutil.rmtree(pair.base_dir)
    shutil.copytree(pair.aligned_dir, pair.base_dir)
    for r in (2, None):
        refused(pair, PairingError, "equal in every selected tensor: nothing to extrapolate", r=r)
        model = load(pair.aligned_dir)
        with model_kept(model), pytest.raises(PairingError, match="nothing to extrapolate"):
            apply_lox(model, config_of(pair, r=r))
    rewrite(pair.base_dir, lambda t: t[Q].mul_(0.5))
    changed = {name for name, tensor in harden(pair).items() if not torch.equal(tensor, pair.aligned()[name])}
    assert changed == {Q}


def test_the_aligned_folder_as_its_own_base(pair: zoo.Pair) -> None:
    link = pair.aligned_dir.parent / "link"
    link.symlink_to(pair.aligned_dir)
    for name in (pair.aligned_dir, link):
        refused(pair, PairingError, "are the same checkpoint", base_model_name_or_path=str(name))


def test_swapped_models(pair: zoo.Pair) -> None:
    card = pair.base_dir / "README.md"
    card.write_text(f"---\nbase_model: {pair.aligned_dir}\n---\n")
    refused(pair, PairingError, "swapped: the card of '.*/base' says that it was made from '.*/aligned'")
    card.write_text("---\nbase_model: org/another\n---\n")
    assert harden(pair)
    edit_json(pair.base_dir / "config.json", lox_config={"r": 6})
    shutil.rmtree(pair.aligned_dir.parent.parent / "out")
    refused(pair, PairingError, "base '.*' is itself hardened by LoX")


def test_a_second_application_needs_asking_for(pair: zoo.Pair, tmp_path: Path) -> None:
    once = harden(pair)
    twice = zoo.Pair("llama", tmp_path / "out", pair.base_dir, pair.dtype, 0)
    with nothing_lost(tmp_path), pytest.raises(AlreadyHardenedError, match=r"r = 2, alpha = 1.25.*allow_repeat=True"):
        harden_checkpoint(twice.aligned_dir, tmp_path / "twice", config_of(twice))
    harden_checkpoint(twice.aligned_dir, tmp_path / "twice", config_of(twice), allow_repeat=True)
    assert not zoo.same_bits(zoo.read_checkpoint(tmp_path / "twice"), once)
    model = load(tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for again in (apply_lox, get_lox_model):
        with pytest.raises(AlreadyHardenedError):
            again(model, config_of(pair))
    assert zoo.same_bits(model.state_dict(), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("r", [2, 0.9, None], ids=str)
@pytest.mark.parametrize("side", ["aligned", "base"])
def test_what_is_not_finite_is_named(side: str, r: Any, value: float, pair: zoo.Pair) -> None:
    """It sits in the last tensor, so that the others are hardened before it is met."""
    last = list(pair.aligned())[-2]
    assert pair.aligned()[last].ndim == 2
    rewrite(pair.aligned_dir if side == "aligned" else pair.base_dir, lambda t: t[last][-1].fill_(value))
    refused(pair, NumericsError, rf"^{re.escape(last)}: .*(NaN|Inf)", r=r)
    model = load(pair.aligned_dir)
    with model_kept(model), pytest.raises(NumericsError, match=re.escape(last)):
        apply_lox(model, config_of(pair, r=r))
    leaf = last.split(".")[-2]
    assert harden(pair, r=r, exclude_modules=[leaf])


@pytest.mark.parametrize("r", [2, None], ids=str)
def test_an_alpha_that_overflows_float16(r: int | None, tmp_path: Path) -> None:
    pair = zoo.save_pair("llama", tmp_path / "pair", dtype=torch.float16)
    with nothing_lost(tmp_path), pytest.raises(NumericsError, match=r"weight: .*overflows float16.*alpha"):
        harden_checkpoint(pair.aligned_dir, tmp_path / "out", config_of(pair, r=r, alpha=1e10))
    model = load(pair.aligned_dir)
    with model_kept(model), pytest.raises(NumericsError, match="overflows float16"):
        apply_lox(model, config_of(pair, r=r, alpha=1e10))
    if r is not None:
        with nothing_lost(tmp_path), pytest.raises(NumericsError, match="factors overflow float32"):
            extract_lox_adapter(pair.aligned_dir, tmp_path / "out", config_of(pair, r=r, alpha=1e300))
    assert harden(pair, r=r, alpha=100.0)


def test_settings_that_do_not_fit_the_model(pair: zoo.Pair) -> None:
    refused(pair, ConfigError, "r exceeds the smaller side", r=193)
    refused(pair, ConfigError, "'nowhere' matches no module", target_modules=["nowhere"])
    refused(pair, ConfigError, "No base model is named .*--base-model", base_model_name_or_path=None)
    refused(pair, CheckpointError, "There is no folder '/nowhere'", base_model_name_or_path="/nowhere")
    refused(pair, CheckpointError, "is a file", base_model_name_or_path=str(pair.base_dir / "config.json"))


@pytest.mark.parametrize("side", ["aligned", "base"])
def test_quantised_files_are_refused_by_scheme(side: str, pair: zoo.Pair) -> None:
    folder = pair.aligned_dir if side == "aligned" else pair.base_dir
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(pair, UnsupportedModelError, rf"^{side} '.*' is quantised \(gptq\).*get_lox_model")


def test_fp8_tensors_are_named(pair: zoo.Pair) -> None:
    rewrite(pair.aligned_dir, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}))
    refused(pair, PairingError, rf"{re.escape(Q)}: float8_e4m3fn against bfloat16 .*same precision")
    assert harden(pair, exclude_modules=["layers.0.self_attn.q_proj"])[Q].dtype == torch.float8_e4m3fn


def test_live_models_without_plain_weights(pair: zoo.Pair) -> None:
    meta = zoo.make_model("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match=r"meta device .*harden_checkpoint"):
        apply_lox(meta, config_of(pair))
    marked = load(pair.aligned_dir)
    marked.config.quantization_config = {"quant_method": "awq"}
    with model_kept(marked), pytest.raises(UnsupportedModelError, match=r"quantised \(awq\).*get_lox_model"):
        apply_lox(marked, config_of(pair))
    with pytest.raises(UnsupportedModelError, match="quantised"):
        apply_lox(load(pair.aligned_dir), LoxConfig(r=2), base_model=marked)
    packed = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(8, 8)), dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        apply_lox(packed, LoxConfig(r=2), base_model=torch.nn.Sequential(torch.nn.Linear(8, 8)))


def test_pickles_are_not_read(pair: zoo.Pair) -> None:
    tensors = pair.aligned()
    for path in [*pair.aligned_dir.glob("*.safetensors"), *pair.aligned_dir.glob("*.index.json")]:
        path.unlink()
    refused(pair, CheckpointError, "has no model.safetensors")
    torch.save(tensors, pair.aligned_dir / "pytorch_model.bin")
    refused(pair, CheckpointError, r"pickle files only \(pytorch_model.bin.*save_pretrained")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_damaged_shards_are_named(pair: zoo.Pair) -> None:
    for side, damage in [
        (pair.aligned_dir, truncate),
        (pair.aligned_dir, lambda path: path.write_bytes(b"garbage" * 99)),
        (pair.base_dir, truncate),
        (pair.base_dir, lambda path: path.write_bytes(b"")),
    ]:
        shard = sorted(side.glob("*.safetensors"))[-1]
        whole = shard.read_bytes()
        damage(shard)
        refused(pair, CheckpointError, rf"Cannot read .*{shard.name}.*download it again")
        shard.write_bytes(whole)
    assert harden(pair)


def lie(change: Callable[[dict[str, Any], list[str]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda weight_map: change(weight_map, sorted(set(weight_map.values())))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lie(lambda m, shards: m.update({Q: "missing.safetensors"})),
            "names files that are not in .*missing.safetensors",
        ),
        (lie(lambda m, shards: m.update({Q: "../base/" + m[Q]})), r"names files that are not in .*\.\./base"),
        (
            lie(lambda m, shards: m.update({Q: next(s for s in shards if s != m[Q])})),
            rf"{re.escape(Q)}: the index says",
        ),
        (lie(lambda m, shards: m.pop(Q)), rf"{re.escape(Q)}: in .*, but not in the index"),
        (lie(lambda m, shards: m.update(invented=shards[0])), "invented: the index says"),
        (lie(lambda m, shards: m.update({Q: [shards[0]]})), "no weight_map"),
        (lie(lambda m, shards: m.clear()), "no weight_map"),
    ],
    ids=["missing", "traversal", "wrong shard", "left out", "invented", "no name", "empty"],
)
def test_an_index_that_lies(change: Callable[[dict[str, Any]], object], match: str, pair: zoo.Pair) -> None:
    for folder in (pair.aligned_dir, pair.base_dir):
        path = folder / "model.safetensors.index.json"
        whole = path.read_text()
        index = json.loads(whole)
        change(index["weight_map"])
        path.write_text(json.dumps(index))
        refused(pair, CheckpointError, match)
        path.write_text(whole)


@pytest.mark.parametrize("content", ["not json", "[]", "{}"])
def test_an_index_that_is_none(content: str, pair: zoo.Pair) -> None:
    (pair.aligned_dir / "model.safetensors.index.json").write_text(content)
    refused(pair, CheckpointError, "Cannot read|no weight_map")


def test_a_subspace_that_does_not_fit(pair: zoo.Pair, tmp_path: Path) -> None:
    subspace = SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LoxConfig(r=2))
    for settings, match in [
        ({"r": 3}, r"r = 3 against 2 stored directions"),
        ({"r": None}, r"full rank \(r=None\) needs the base"),
    ]:
        model = load(pair.aligned_dir)
        with model_kept(model), pytest.raises(PairingError, match=match):
            apply_lox(model, LoxConfig(**settings), base_model=subspace)
    other = zoo.save_pair("qwen2", tmp_path / "qwen2")
    with nothing_lost(tmp_path), pytest.raises(PairingError, match=r"against \(.*not in|does not fit"):
        harden_checkpoint(other.aligned_dir, tmp_path / "out", LoxConfig(r=2), base_model=subspace)
    assert harden_checkpoint(pair.aligned_dir, tmp_path / "out", LoxConfig(r=1), base_model=subspace).tensors


def adapter(pair: zoo.Pair, folder: Path, **settings: Any) -> Any:
    """Save a LoRA adapter with factors that are not zero."""
    targets = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(load(pair.base_dir), LoraConfig(r=4, **targets, **settings))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_adapters_that_are_not_plain_lora(settings: dict[str, Any], pair: zoo.Pair, tmp_path: Path) -> None:
    model = adapter(pair, tmp_path / "adapter", **settings)
    with nothing_lost(tmp_path), pytest.raises(UnsupportedModelError, match=r"LoRA with (use_dora|bias).*Merge it"):
        harden_checkpoint(tmp_path / "adapter", tmp_path / "out", LoxConfig(r=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="only plain LoRA"):
        apply_lox(model, LoxConfig(r=2))
    assert zoo.same_bits(model.state_dict(), before)


def test_adapters_in_trouble(pair: zoo.Pair, tmp_path: Path) -> None:
    adapter(pair, tmp_path / "adapter")
    weights, settings = tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_config.json"
    tensors, config = load_file(weights), settings.read_text()
    half = {name: tensor.half() for name, tensor in tensors.items()}
    broken = {**tensors, next(name for name in tensors if "lora_B" in name): torch.full((96, 4), torch.nan)}
    for content, alpha, error, match in [
        (broken, 1.0, NumericsError, "q_proj: .*NaN"),
        (half, 1e20, NumericsError, "q_proj: .*overflow float16: alpha is too large"),
        ({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, 1.0, PairingError, "zero in every"),
        ({"other": torch.zeros(2)}, 1.0, CheckpointError, "no LoRA factors"),
    ]:
        save_file(content, weights)
        with nothing_lost(tmp_path), pytest.raises(error, match=match):
            harden_checkpoint(tmp_path / "adapter", tmp_path / "out", LoxConfig(r=2, alpha=alpha))
    save_file(tensors, weights)
    for damage, match in [
        (lambda: edit_json(settings, r=None), "does not say r"),
        (lambda: settings.write_text("{"), "Cannot read"),
        (lambda: truncate(weights), "truncated"),
    ]:
        damage()
        with nothing_lost(tmp_path), pytest.raises(CheckpointError, match=match):
            harden_checkpoint(tmp_path / "adapter", tmp_path / "out", LoxConfig(r=2))
        settings.write_text(config)
    save_file(tensors, weights)
    harden_checkpoint(tmp_path / "adapter", tmp_path / "out", LoxConfig(r=2))
    with nothing_lost(tmp_path), pytest.raises(AlreadyHardenedError):
        harden_checkpoint(tmp_path / "out", tmp_path / "twice", LoxConfig(r=2))
    assert not zoo.same_bits(load_file(tmp_path / "out/adapter_model.safetensors"), tensors)


def test_a_negative_alpha_on_an_adapter_turns_it_round(pair: zoo.Pair, tmp_path: Path) -> None:
    """The flag allows what is refused otherwise: dW + alpha dW = -dW with alpha = -2."""
    adapter(pair, tmp_path / "adapter")
    harden_checkpoint(tmp_path / "adapter", tmp_path / "out", LoxConfig(r=None, alpha=-2.0, allow_negative_alpha=True))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    for b in [name for name in before if "lora_B" in name]:
        a = b.replace("lora_B", "lora_A")
        # Float32 factors: a few units in the last place of the largest entry.
        torch.testing.assert_close(after[b] @ after[a], -(before[b] @ before[a]), rtol=1e-4, atol=1e-5)
