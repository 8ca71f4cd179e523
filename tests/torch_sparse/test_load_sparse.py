"""A packed folder in a model against the fake-quantized checkpoint it came from, and folders that are wrong."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sqat.checkpoint.manifest import manifest_digest
from sqat.checkpoint.store import Checkpoint
from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError
from sqat.evaluation.evaluate import served_model
from sqat.export.packed_folder import MANIFEST, TENSORS
from sqat.models.loading import PreTrainedModel
from sqat.modules.sites import Site
from sqat.torch_sparse.linear import SparseLinear
from sqat.torch_sparse.load import LoadResult, densify_, load_model, load_sparse_
from tests.errors import raises_code
from tests.torch_sparse.conftest import MakeCheckpoint, WriteFolder, texts

SIZES = [(1, 1), (1, 7), (2, 8), (3, 12), (5, 14), (2, 35), (1, 17), (2, 16)]


def empty_model(folder: Path) -> PreTrainedModel:
    """Built from the folder's config alone, with random weights."""
    torch.manual_seed(99)
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return model.eval()


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def differences(checkpoint: Checkpoint, model: PreTrainedModel) -> Tensor:
    """Largest difference of each text's logits from those of the served checkpoint."""
    with served_model(checkpoint) as (served, _):
        batches = [texts(rows, tokens, seed) for seed, (rows, tokens) in enumerate(SIZES)]
        return torch.cat([(logits(served, batch) - logits(model, batch)).abs().amax(1) for batch in batches])


def same(found: Tensor) -> bool:
    """Equal but for float rounding, which in a text now and then pushes one value over the edge of a quantization step
    that all later layers see."""
    return float((found < 1e-5).float().mean()) >= 0.75 and float(found.max()) < 0.1


@pytest.mark.parametrize("placement", ["linear", "tensorrt"])
def test_loaded_model_is_the_served_checkpoint(
    family: str, placement: str, calibrated: MakeCheckpoint, write_folder: WriteFolder
) -> None:
    checkpoint = calibrated(family, placement)
    folder = write_folder(checkpoint)
    model = empty_model(folder)
    loaded = load_sparse_(model, folder)
    assert same(differences(checkpoint, model))
    layers = [name for name, record in checkpoint.manifest.layers.items() if record.pattern]
    assert list(loaded.backends) == layers
    assert all(isinstance(model.get_submodule(name), SparseLinear) for name in layers)
    plans = loaded.plans["reference"]
    calls = len(SIZES) * len(layers)
    assert plans.hits + plans.misses == calls
    assert plans.size == plans.misses <= len({checkpoint.weights[f"{name}.weight"].shape for name in layers}) * 5


@pytest.mark.parametrize("family", ["deberta-v2", "albert"])
def test_layers_that_run_twice_are_right(family: str, calibrated: MakeCheckpoint, write_folder: WriteFolder) -> None:
    """DeBERTa's keys also run on the relative positions, ALBERT's one block is all blocks."""
    checkpoint = calibrated(family, "tensorrt")
    folder = write_folder(checkpoint)
    model = empty_model(folder)
    load_sparse_(model, folder)
    assert same(differences(checkpoint, model))


def test_shapes_that_cutlass_takes_are_read_in_its_order(calibrated: MakeCheckpoint, write_folder: WriteFolder) -> None:
    checkpoint = calibrated("bert", "linear", hidden_size=128, intermediate_size=256)
    folder = write_folder(checkpoint)
    entries = json.loads((folder / MANIFEST).read_text())["layers"]
    assert {entry["order"] for entry in entries.values()} == {"cutlass"}
    model = empty_model(folder)
    load_sparse_(model, folder)
    assert same(differences(checkpoint, model))


def test_layers_differ_from_the_fake_quantized_by_float_rounding_alone(
    calibrated: MakeCheckpoint, write_folder: WriteFolder
) -> None:
    """Each layer fed with what reaches it in the served model: no noise of other layers comes in."""
    checkpoint = calibrated("bert", "linear")
    folder = write_folder(checkpoint)
    model = empty_model(folder)
    loaded = load_sparse_(model, folder)
    seen: list[tuple[str, Tensor, Tensor]] = []

    with served_model(checkpoint) as (served, _):
        for name in loaded.backends:
            served.get_submodule(name).register_forward_hook(
                lambda module, args, y, name=name: seen.append((name, args[0], y))
            )
        for tokens in (1, 16, 35):
            logits(served, texts(2, tokens, tokens))
    assert len(seen) == 3 * len(loaded.backends)
    for name, x, y in seen:
        torch.testing.assert_close(model.get_submodule(name)(x), y, rtol=1e-5, atol=1e-5)


def test_inputs_of_linears_alone_by_choice(calibrated: MakeCheckpoint, write_folder: WriteFolder) -> None:
    checkpoint = calibrated("bert", "tensorrt")
    folder = write_folder(checkpoint)
    whole, some = empty_model(folder), empty_model(folder)
    all_sites, linears = load_sparse_(whole, folder), load_sparse_(some, folder, sites="linears")
    assert all_sites.insertion is not None
    assert linears.insertion is None
    assert same(differences(checkpoint, whole))
    found = differences(checkpoint, some)
    assert not same(found), "the sites that were left out are missed"
    assert float(found.max()) < 0.5
    assert not any("tap" in name for module in some.modules() for name in vars(module))


def test_densify_gives_a_plain_model_with_the_served_weights(
    calibrated: MakeCheckpoint, write_folder: WriteFolder
) -> None:
    checkpoint = calibrated("bert", "tensorrt")
    folder = write_folder(checkpoint)
    model = empty_model(folder)
    attention = model.config._attn_implementation
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    loaded = load_sparse_(model, folder)
    densify_(model, loaded)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    assert model.config._attn_implementation == attention
    assert all(set(vars(module)) <= attributes[name] for name, module in model.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with served_model(checkpoint) as (served, _):
        for name in loaded.backends:
            assert torch.equal(model.get_submodule(name).weight, served.get_submodule(name).weight)
    again = load_sparse_(model, folder)
    assert same(differences(checkpoint, model))
    assert again.backends.keys() == loaded.backends.keys()


def test_threads_share_a_model(packed_folder: Path) -> None:
    model = empty_model(packed_folder)
    loaded = load_sparse_(model, packed_folder)
    batches = [texts(2, tokens, tokens) for tokens in (3, 9, 17, 30)]
    wanted = [logits(model, batch) for batch in batches]
    wrong: list[int] = []

    def work(number: int) -> None:
        for step in range(12):
            chosen = (number + step) % len(batches)
            if not torch.equal(logits(model, batches[chosen]), wanted[chosen]):
                wrong.append(chosen)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    plans = loaded.plans["reference"]
    assert plans.hits + plans.misses == (4 * 12 + 4) * len(loaded.backends)


def test_a_half_model_runs_with_the_same_integers(packed_folder: Path) -> None:
    model = empty_model(packed_folder)
    load_sparse_(model, packed_folder)
    half = empty_model(packed_folder).half()
    load_sparse_(half, packed_folder)
    scale = half.get_submodule("bert.encoder.layer.0.output.dense").weight_scale
    assert scale.dtype == torch.float32
    batch = texts(3, 12)
    y = logits(half, batch)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), logits(model, batch), rtol=0.05, atol=0.05)


def test_transformers_reads_config_and_tokenizer_and_refuses_the_rest(packed_folder: Path) -> None:
    """A file called model.safetensors would be read in part, and the sparse weights made up."""
    assert AutoConfig.from_pretrained(packed_folder).model_type == "bert"
    assert AutoTokenizer.from_pretrained(packed_folder)("red blue")["input_ids"]
    with pytest.raises(OSError, match="no file named"):
        AutoModelForSequenceClassification.from_pretrained(packed_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_gives_model_and_processor(packed_folder: Path, dtype: torch.dtype) -> None:
    model, processor = load_model(packed_folder, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    assert isinstance(processor, TextProcessor)
    filled = empty_model(packed_folder).to(dtype)
    load_sparse_(filled, packed_folder)
    inputs = processor.tokenizer(["red blue w1", "w2"], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    assert not model.training
    assert model.dtype == dtype
    assert torch.equal(logits(model, inputs), logits(filled, inputs))


def test_the_packed_model_saves_and_loads_its_own_state(packed_folder: Path) -> None:
    model, other = empty_model(packed_folder), empty_model(packed_folder)
    load_sparse_(model, packed_folder)
    load_sparse_(other, packed_folder)
    stored = {name for name in load_file(packed_folder / TENSORS) if not name.endswith(".amax")}
    assert stored == set(model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, texts(2, 9)), logits(model, texts(2, 9)))


def untouched(model: PreTrainedModel) -> bool:
    return not any(isinstance(module, SparseLinear) for module in model.modules())


def test_a_gpu_backend_on_a_cpu_is_one_clear_line(packed_folder: Path) -> None:
    model = empty_model(packed_folder)
    with pytest.raises(SqatError) as error:
        load_sparse_(model, packed_folder, "cusparselt")
    assert error.value.code == "missing-hardware"
    assert untouched(model)
    loaded = load_sparse_(model, packed_folder)
    assert set(loaded.unusable) == {"cusparselt", "cutlass"}


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the tensors, digests and all, so that only their content is wrong."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    change_entries(folder, lambda entries: None)


def change_entries(folder: Path, change: Callable[[dict[str, Any]], Any], seal: bool = True) -> None:
    from hashlib import sha256

    entries = json.loads((folder / MANIFEST).read_text())
    entries["files"][TENSORS] = sha256((folder / TENSORS).read_bytes()).hexdigest()
    change(entries)
    if seal:
        entries["sha256"] = manifest_digest(entries)
    (folder / MANIFEST).write_text(json.dumps(entries))


LAYER, QUERY = "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[f"{LAYER}.metadata"].zero_(), "output.dense: .* name two places that do not increase"),
        (lambda t: t[f"{LAYER}.values"].fill_(-128), "output.dense holds -128"),
        (lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"][:16].clone()}), "need metadata"),
        (lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"].half()}), "need metadata"),
        (lambda t: t[f"{LAYER}.weight_scale"].neg_(), "the scales of .*output.dense must be float32 .*positive"),
        (lambda t: t[f"{LAYER}.input_scale"].fill_(float("inf")), "input scale of .*output.dense must be"),
        (lambda t: t.pop(f"{LAYER}.input_scale"), "output.dense.input_scale is missing"),
        (lambda t: t.pop(f"{LAYER}.values"), "output.dense.values is missing"),
        (lambda t: t.pop(f"{LAYER}.bias"), "the weight .*output.dense.bias is missing"),
        (lambda t: t.update({"more": torch.zeros(2)}), "the weight more does not fit"),
        (lambda t: t.update({"classifier.bias": torch.zeros(7)}), "the weight classifier.bias does not fit"),
    ],
)
def test_a_wrong_tensor_is_an_error(packed_folder: Path, change: Any, problem: str) -> None:
    change_tensors(packed_folder, change)
    model = empty_model(packed_folder)
    with pytest.raises(SqatError, match=problem):
        load_sparse_(model, packed_folder)
    assert untouched(model)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda e: e.update(format=2), "has format 2, this sqat reads 1"),
        (lambda e: e.update(format="1"), "has format '1'"),
        (lambda e: e.update(more=1), "the entry more is not valid"),
        (lambda e: e["layers"][LAYER].update(type="int4"), rf"the entry layers.{LAYER}.type is not valid"),
        (lambda e: e["layers"][LAYER].update(shape=[64, 32]), r"output.dense is torch.int8 \[32, 64\], .* \[64, 32\]"),
        (lambda e: e["layers"][QUERY].update(order="cutlass"), "cannot be ordered for CUTLASS"),
        (lambda e: e["layers"].update(other=e["layers"][LAYER]), "the tensor other.values is missing"),
        (
            lambda e: e["files"].update({"../x": "0"}),
            "sparse.json: the manifest names a file outside the folder: '../x'",
        ),
        (lambda e: e["files"].update({"lost.json": "0"}), "lost.json: the file is missing"),
        (lambda e: e["sites"].update({"a:input": "b:input"}), "the tensor b:input.amax is missing"),
    ],
)
def test_a_wrong_entry_is_an_error(packed_folder: Path, change: Any, problem: str) -> None:
    model = empty_model(packed_folder)
    change_entries(packed_folder, change)
    with pytest.raises(SqatError, match=problem):
        load_sparse_(model, packed_folder)
    assert untouched(model)


def test_changed_bytes_are_errors(packed_folder: Path) -> None:
    model = empty_model(packed_folder)
    for name in (TENSORS, "config.json"):
        content = (packed_folder / name).read_bytes()
        (packed_folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(SqatError) as error:
            load_sparse_(model, packed_folder)
        assert error.value.code == "damaged-checkpoint"
        (packed_folder / name).write_bytes(content)
    change_entries(packed_folder, lambda entries: entries.update(base_model="other"), seal=False)
    with pytest.raises(SqatError) as error:
        load_sparse_(model, packed_folder)
    assert error.value.code == "damaged-checkpoint"
    for content in ("{", "[" * 100_000, '{"format": 1' + "0" * 5000 + "}"):
        (packed_folder / MANIFEST).write_text(content)
        with raises_code("damaged-checkpoint"):
            load_sparse_(model, packed_folder)


def test_nothing_is_unpickled(packed_folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return pytest.fail, ("unpickled",)

    (packed_folder / TENSORS).write_bytes(pickle.dumps(Trap()))
    change_entries(packed_folder, lambda entries: None)
    with pytest.raises(SqatError) as error:
        load_sparse_(empty_model(packed_folder), packed_folder)
    assert error.value.code == "damaged-checkpoint"


def test_a_folder_that_is_none_is_an_error(tmp_path: Path, packed_folder: Path) -> None:
    with pytest.raises(SqatError) as error:
        load_sparse_(empty_model(packed_folder), tmp_path)
    assert error.value.code == "not-a-checkpoint"


def test_another_model_is_an_error(packed_folder: Path, make_model: Callable[..., Any]) -> None:
    with pytest.raises(SqatError) as error:
        load_sparse_(make_model("distilbert"), packed_folder)
    assert error.value.code == "model-mismatch"
    wider = make_model("bert", intermediate_size=128)
    with pytest.raises(SqatError) as error:
        load_sparse_(wider, packed_folder)
    assert error.value.code == "model-mismatch"
    assert untouched(wider)
    model = empty_model(packed_folder)
    load_sparse_(model, packed_folder)
    with pytest.raises(SqatError) as error:
        load_sparse_(model, packed_folder)
    assert error.value.code == "model-mismatch"


def test_layers_that_stayed_dense_are_quantized_as_in_training(
    calibrated: MakeCheckpoint, write_folder: WriteFolder
) -> None:
    """48 is no multiple of 32: those layers are float weights on the int8 grid behind a fake quantizer."""
    checkpoint = calibrated("bert", "linear", intermediate_size=48)
    folder = write_folder(checkpoint)
    model = empty_model(folder)
    loaded = load_sparse_(model, folder)
    assert len(loaded.backends) == 8
    assert "[48, 32] is not a multiple of [32, 32]" in loaded.dense["bert.encoder.layer.0.intermediate.dense"]
    assert loaded.insertion is not None
    assert {Site(site).role for site in loaded.insertion.quantizers.shared_with} == {"input"}
    assert same(differences(checkpoint, model))


def test_a_pruned_checkpoint_without_scales_runs_in_float16(
    calibrated: MakeCheckpoint, write_folder: WriteFolder
) -> None:
    whole = calibrated("bert", "linear")
    layers = {name: record.model_copy(update={"quantized": False}) for name, record in whole.manifest.layers.items()}
    manifest = whole.manifest.model_copy(update={"layers": layers, "sites": {}, "placement": ""})
    checkpoint = Checkpoint(manifest, whole.files, whole.weights, whole.masks)
    folder = write_folder(checkpoint)
    model = empty_model(folder)
    loaded = load_sparse_(model, folder)
    assert {model.get_submodule(name).values.dtype for name in loaded.backends} == {torch.float16}
    found = differences(checkpoint, model)
    assert 0 < float(found.max()) < 0.02


def test_one_description_says_what_was_done(packed_folder: Path) -> None:
    loaded: LoadResult = load_sparse_(empty_model(packed_folder), packed_folder)
    assert {name: backend.name for name, backend in loaded.backends.items()}[LAYER] == "reference"
    assert loaded.dense["classifier"] == "outside the encoder blocks (rule B8)"
    assert packed_folder.name == "semi-structured"
