"""Every way to harden a model gives the same weights: in memory, on disk, as a merged adapter, for every kind."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import zoo
from lox_hf import (
    LoxConfig,
    SafetySubspace,
    UnsupportedModelError,
    apply_lox,
    extract_lox_adapter,
    get_lox_model,
    harden_checkpoint,
    revert_lox,
)
from oracle import assert_close_to_oracle, expected_hardened, ulp_distance

DENSE_KINDS = [kind for kind in zoo.KINDS if kind not in zoo.MOE_KINDS]
R, ALPHA = 2, 1.25  # the zoo's spectra have a gap after the second direction, so the projector is well defined
ONE_SHARD = "1GB"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Pairs"]:
    yield Pairs(tmp_path_factory.mktemp("pairs"))


class Pairs:
    """Saved pairs, each built when it is first asked for; tests only read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[tuple[object, ...], zoo.Pair] = {}

    def __call__(self, kind: str, dtype: torch.dtype = torch.bfloat16, **shards: str) -> zoo.Pair:
        key = (kind, dtype, *sorted(shards.items()))
        if key not in self.saved:
            self.saved[key] = zoo.save_pair(kind, self.folder / str(len(self.saved)), dtype=dtype, **shards)
        return self.saved[key]


def config_of(pair: zoo.Pair, **settings: object) -> LoxConfig:
    return LoxConfig(**{"base_model_name_or_path": str(pair.base_dir), "r": R, "alpha": ALPHA, **settings})


def hardened_files(pair: zoo.Pair, output: Path, **settings: object) -> dict[str, torch.Tensor]:
    harden_checkpoint(str(pair.aligned_dir), output, config_of(pair, **settings))
    return zoo.read_checkpoint(output)


def load(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def saved_tensors(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """What the model's own save_pretrained writes: checkpoint names, tied weights once."""
    model.save_pretrained(folder)
    return zoo.read_checkpoint(folder)


def exact(pair: zoo.Pair, r: int | None = R, alpha: float = ALPHA) -> dict[str, torch.Tensor]:
    return expected_hardened(pair.aligned(), pair.base(), r, alpha)


def test_the_oracle_notices_what_is_wrong(pairs: Pairs) -> None:
    """The control of every comparison below."""
    pair = pairs("llama")
    expected = exact(pair)
    rounded = {name: tensor.bfloat16() for name, tensor in expected.items()}
    assert_close_to_oracle(rounded, expected, torch.bfloat16)
    for wrong in (exact(pair, R + 1), exact(pair, R, 1.01 * ALPHA), pair.aligned()):
        with pytest.raises(AssertionError, match=r"far from the oracle:\n.*entries differ"):
            assert_close_to_oracle({name: tensor.bfloat16() for name, tensor in wrong.items()}, expected)
    name = "lm_head.weight"
    moved = torch.where(torch.arange(96) % 3 == 0, rounded[name] * (1 + 2**-7), rounded[name])
    with pytest.raises(AssertionError, match=f"{name}: .* by up to [12] ulp"):
        assert_close_to_oracle({**rounded, name: moved}, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_ulp_is_the_next_number(dtype: torch.dtype) -> None:
    numbers = torch.tensor([-1.0, -0.0, 0.0, 1.0, 3.0], dtype=dtype)
    up = torch.nextafter(numbers, torch.full_like(numbers, torch.inf))
    assert ulp_distance(numbers, up).tolist() == [1] * 5
    assert ulp_distance(numbers[1:2], numbers[2:3]).item() == 0  # -0 is 0
    smallest = up[2:3]
    assert ulp_distance(-smallest, smallest).item() == 2


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_disk_matches_the_oracle(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind)
    assert_close_to_oracle(hardened_files(pair, tmp_path / "out"), exact(pair), torch.bfloat16)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_memory_is_disk(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind)
    model = apply_lox(load(pair.aligned_dir), config_of(pair))
    live = saved_tensors(model, tmp_path / "live")
    files = hardened_files(pair, tmp_path / "files")
    assert_close_to_oracle(live, exact(pair), torch.bfloat16)
    # Both run the same arithmetic on the same numbers.
    assert zoo.same_bits(live, files)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_the_hardened_checkpoint_loads_and_generates(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind)
    files = hardened_files(pair, tmp_path / "out")
    model = load(tmp_path / "out").eval()
    assert model.dtype == torch.bfloat16
    assert zoo.same_bits(saved_tensors(model, tmp_path / "again"), files)
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert output.shape[1] > 3


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_the_merged_adapter_matches_the_oracle(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind)
    # PEFT merges what is on both ends of a tied weight into it twice: there the adapter leaves it out.
    left_out = [embedding_of(kind)] if kind in zoo.TIED_KINDS else []
    settings = config_of(pair, exclude_modules=left_out or None, cast_base=True)
    expected = expected_hardened(
        pair.aligned(), pair.base(), R, ALPHA, is_target=lambda name: name.split(".")[-2] not in left_out
    )
    # In float32, as PEFT's merge of an embedding rounds once more in bfloat16.
    merged = get_lox_model(load(pair.aligned_dir, torch.float32), settings).merge_and_unload()
    assert_close_to_oracle(saved_tensors(merged, tmp_path / "live"), to_float32(expected), torch.float32)

    extract_lox_adapter(str(pair.aligned_dir), tmp_path / "adapter", config_of(pair, exclude_modules=left_out or None))
    loaded = PeftModel.from_pretrained(load(pair.aligned_dir, torch.float32), tmp_path / "adapter")
    live = saved_tensors(loaded.merge_and_unload(), tmp_path / "stock")
    assert_close_to_oracle(live, to_float32(expected), torch.float32)


@pytest.mark.parametrize("kind", DENSE_KINDS)
@pytest.mark.filterwarnings("ignore:.*shares its weight:UserWarning")
def test_the_attached_adapter_is_the_dense_edit(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    """Logits with nothing left out, tied heads included, from a live adapter and from one that stock PEFT loads."""
    pair, tokens = pairs(kind), torch.tensor([[5, 6, 7, 8]])
    settings = config_of(pair, cast_base=True)
    dense = apply_lox(load(pair.aligned_dir, torch.float32), settings).eval()
    aligned = load(pair.aligned_dir, torch.float32).eval()
    extract_lox_adapter(str(pair.aligned_dir), tmp_path / "adapter", config_of(pair))
    with torch.no_grad():
        before, expected = aligned(tokens).logits, dense(tokens).logits
        allowed = 1e-5 * expected.abs().max().item()  # float32 sums in another order
        assert (expected - before).abs().max().item() > 1e3 * allowed  # control: LoX does something
        stock = PeftModel.from_pretrained(load(pair.aligned_dir, torch.float32), tmp_path / "adapter").eval()
        assert (stock(tokens).logits - expected).abs().max().item() <= allowed
        adapted = get_lox_model(aligned, settings).eval()
        assert (adapted(tokens).logits - expected).abs().max().item() <= allowed
        with adapted.disable_adapter():
            assert torch.equal(adapted(tokens).logits, before)


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_a_tied_head_in_an_adapter_is_warned_of(kind: str, pairs: Pairs) -> None:
    pair = pairs(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_lox_model(load(pair.aligned_dir), config_of(pair))
    told = any("shares its weight" in str(warning.message) for warning in caught)
    assert told == (kind in zoo.TIED_KINDS)


@pytest.mark.parametrize("kind", zoo.MOE_KINDS)
def test_experts_have_no_adapter_form(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind)
    with pytest.raises(UnsupportedModelError, match="expert"):
        get_lox_model(load(pair.aligned_dir), config_of(pair))
    with pytest.raises(UnsupportedModelError, match="expert"):
        extract_lox_adapter(str(pair.aligned_dir), tmp_path / "adapter", config_of(pair))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("kind", zoo.MOE_KINDS)
def test_attention_of_an_expert_model_has_one(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    """The control: what is refused are the experts, not the model."""
    pair, targets = pairs(kind), ["q_proj", "o_proj"]
    model = load(pair.aligned_dir, torch.float32)
    settings = config_of(pair, target_modules=targets, cast_base=True)
    live = saved_tensors(get_lox_model(model, settings).merge_and_unload(), tmp_path / "live")
    expected = expected_hardened(
        pair.aligned(), pair.base(), R, ALPHA, is_target=lambda name: name.split(".")[-2] in targets
    )
    assert_close_to_oracle(live, to_float32(expected), torch.float32)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss"])
def test_one_shard_is_many(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    many = pairs(kind)
    one = pairs(kind, max_shard_size=ONE_SHARD, base_max_shard_size=ONE_SHARD)
    other = pairs(kind, max_shard_size="20KB", base_max_shard_size="45KB")
    assert zoo.count_shards(one.aligned_dir) == 1 < zoo.count_shards(many.aligned_dir)
    assert zoo.count_shards(other.base_dir) not in (zoo.count_shards(other.aligned_dir), 1)
    results = [hardened_files(pair, tmp_path / str(i)) for i, pair in enumerate((many, one, other))]
    assert zoo.same_bits(results[0], results[1])
    assert zoo.same_bits(results[0], results[2])


def test_the_output_has_the_aligned_models_shards_and_side_files(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama", base_max_shard_size="45KB")
    hardened_files(pair, tmp_path / "out")
    for path in sorted(pair.aligned_dir.iterdir()):
        ours = tmp_path / "out" / path.name
        if path.suffix == ".safetensors":
            before, after = [
                [(name, tensor.shape, tensor.dtype) for name, tensor in load_file(file).items()]
                for file in (path, ours)
            ]
            assert before == after
        elif path.name != "config.json":  # which gets the settings
            assert ours.read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_alpha_zero_is_the_identity(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind)
    assert zoo.same_bits(hardened_files(pair, tmp_path / "out", alpha=0.0), pair.aligned())
    model = apply_lox(load(pair.aligned_dir), config_of(pair, alpha=0.0))
    assert zoo.same_bits(saved_tensors(model, tmp_path / "live"), pair.aligned())
    # Control: another strength is another model.
    assert not zoo.same_bits(hardened_files(pair, tmp_path / "control"), pair.aligned())


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_full_rank_is_aligned_plus_alpha_delta(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind)
    files = hardened_files(pair, tmp_path / "out", r=None, alpha=0.5)
    live = saved_tensors(apply_lox(load(pair.aligned_dir), config_of(pair, r=None, alpha=0.5)), tmp_path / "live")
    assert zoo.same_bits(live, files)
    assert_close_to_oracle(files, exact(pair, None, 0.5), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_other_dtypes(kind: str, dtype: torch.dtype, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind, dtype)
    files = hardened_files(pair, tmp_path / "out")
    live = saved_tensors(apply_lox(load(pair.aligned_dir), config_of(pair)), tmp_path / "live")
    assert zoo.same_bits(live, files)
    assert_close_to_oracle(files, exact(pair), dtype)


@pytest.mark.parametrize("r", [1, 2, 6])
@pytest.mark.parametrize("svd", ["auto", "exact"])
def test_every_rank_and_decomposition(r: int, svd: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    files = hardened_files(pair, tmp_path / "out", r=r, svd=svd)
    assert_close_to_oracle(files, exact(pair, r), torch.bfloat16)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_tied_weights_stay_tied_and_are_edited_once(kind: str, pairs: Pairs) -> None:
    pair = pairs(kind)
    model = apply_lox(load(pair.aligned_dir), config_of(pair))
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == (kind in zoo.TIED_KINDS)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_revert_gives_the_aligned_weights_back(kind: str, pairs: Pairs) -> None:
    pair = pairs(kind)
    model = load(pair.aligned_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_lox(model, config_of(pair))
    assert not zoo.same_bits(model.state_dict(), before)
    revert_lox(model)
    assert zoo.same_bits(model.state_dict(), before)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss"])
def test_every_form_of_the_base_is_the_same(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs(kind)
    settings = dataclasses.replace(config_of(pair), base_model_name_or_path=None)
    forms = {
        "folder": str(pair.base_dir),
        "module": load(pair.base_dir),
        "state dict": pair.base(),
        "subspace": SafetySubspace.from_models(str(pair.aligned_dir), str(pair.base_dir), settings),
    }
    results = {
        form: saved_tensors(apply_lox(load(pair.aligned_dir), settings, base_model=base), tmp_path / form)
        for form, base in forms.items()
    }
    for form in ("module", "state dict"):
        assert zoo.same_bits(results[form], results["folder"]), form
    assert_close_to_oracle(results["subspace"], exact(pair), torch.bfloat16)


def test_a_saved_subspace_takes_another_alpha(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    found = SafetySubspace.from_models(str(pair.aligned_dir), str(pair.base_dir), config_of(pair))
    found.save_pretrained(tmp_path / "subspace")
    subspace = SafetySubspace.from_pretrained(tmp_path / "subspace")
    model = apply_lox(load(pair.aligned_dir), LoxConfig(r=R, alpha=0.5), base_model=subspace)
    assert_close_to_oracle(saved_tensors(model, tmp_path / "live"), exact(pair, R, 0.5), torch.bfloat16)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_existing_lora_adapter_is_hardened_and_keeps_its_rank(kind: str, pairs: Pairs, tmp_path: Path) -> None:
    """The aligned model is base + LoRA, so the oracle takes the merged model for aligned and needs no base files."""
    pair, rank = pairs(kind, torch.float32), 4
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "down_proj"]
    settings = LoxConfig(r=R, alpha=ALPHA)

    def adapted() -> PeftModel:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=kind == "gpt2")
        model = get_peft_model(load(pair.base_dir), lora)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # Growing in scale by direction, so that the spectrum has gaps.
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 2.0 ** -torch.arange(rank)
                with torch.no_grad():
                    parameter.copy_(0.05 * noise * (scale[:, None] if "lora_A" in name else scale))
        return model

    aligned = saved_tensors(adapted().merge_and_unload(), tmp_path / "aligned")
    expected = to_float32(expected_hardened(aligned, pair.base(), R, ALPHA))

    hardened = apply_lox(adapted(), settings)
    assert hardened.peft_config["default"].r == rank
    live = saved_tensors(hardened.merge_and_unload(), tmp_path / "live")
    assert_close_to_oracle(live, expected, torch.float32)

    adapted().save_pretrained(tmp_path / "adapter")
    harden_checkpoint(tmp_path / "adapter", tmp_path / "hardened", settings)
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()}
    loaded = load_file(tmp_path / "hardened/adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in loaded.items()} == shapes
    merged = PeftModel.from_pretrained(load(pair.base_dir), tmp_path / "hardened").merge_and_unload()
    assert_close_to_oracle(saved_tensors(merged, tmp_path / "files"), expected, torch.float32)

    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert zoo.same_bits(revert_lox(apply_lox(model, settings)).state_dict(), before)


def embedding_of(kind: str) -> str:
    return "wte" if kind == "gpt2" else "embed_tokens"


def to_float32(expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Untouched tensors in the dtype of a model loaded in float32; the exact ones are compared as they are."""
    return {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in expected.items()}
