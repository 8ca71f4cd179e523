"""Pretrained models and checkpoints: what is loaded, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqat.checkpoint.manifest import Manifest
from sqat.checkpoint.store import Checkpoint
from sqat.data.tokens import TextProcessor
from sqat.models.attention import use_hooked_attention
from sqat.models.classifiers import set_dropout
from sqat.models.loading import build, load_pretrained, serialize_model
from sqat.models.sources import resolve_source, source_digest
from sqat.models.text import load_tokenizer
from sqat.recipe.inputs import ModelConfig
from tests.models.loading import MakeModel, problem

MakeSource = Callable[..., Path]


HEAD = {"num_labels": 2}


MANIFEST = Manifest(stage="t", type="train", fingerprint="k", base_model="b", seed=0)


def load(source: Path | str, folder: Path, seed: int = 0, **config: Any) -> tuple[PreTrainedModel, Any]:
    known = {"source": str(source), "max_length": 16, **config}
    model, processor = load_pretrained("texts", ModelConfig(**known), folder, HEAD, seed)
    assert isinstance(model, PreTrainedModel)
    assert isinstance(processor, TextProcessor)
    return model, processor.tokenizer


def edit_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_source: MakeSource) -> Path:
    """An installed package with a model in it, that complains when it is imported."""
    root = tmp_path / "site" / "tiny_package"
    shutil.copytree(make_source("bert"), root / "models" / "tiny")
    (root / "__init__.py").write_text("raise ImportError('imported')")
    (tmp_path / "site" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_a_package_is_found_without_importing_it(package: Path, tmp_path: Path) -> None:
    source = "package:tiny_package/models/tiny"
    assert resolve_source(source, tmp_path) == str(package / "models" / "tiny")
    assert "tiny_package" not in sys.modules
    load("package:tiny_package/models/tiny", tmp_path)
    assert "tiny_package" not in sys.modules


@pytest.mark.parametrize("inner", ["/../..", "/models/../..", "/..", "/../../../..", "/models", "", "/nowhere"])
def test_a_package_holds_its_model_inside(inner: str, package: Path, tmp_path: Path) -> None:
    source = f"package:tiny_package{inner}"
    assert problem(resolve_source, source, tmp_path) == (
        f"model.source is {source!r}, but that folder of the package holds no model; "
        f"looked at {(package / inner.removeprefix('/')).resolve()}"
    )


def test_a_link_out_of_a_package_is_not_followed(package: Path, tmp_path: Path, make_source: MakeSource) -> None:
    (package / "outside").symlink_to(make_source("bert"))
    source = "package:tiny_package/outside"
    assert problem(resolve_source, source, tmp_path).endswith(str((package / "outside").resolve()))


@pytest.mark.parametrize("name", ["no_such_package", "os.path", "json", "", "..", "a b"])
def test_a_package_that_is_not_installed(name: str, tmp_path: Path) -> None:
    source = f"package:{name}/m"
    if name == "json":  # a package, but without a model
        assert "holds no model" in problem(resolve_source, source, tmp_path)
        return
    assert problem(resolve_source, source, tmp_path) == (
        f"model.source is {source!r}, but no package {name!r} is installed; "
        f"pip install {name.replace('_', '-')}, or name a folder or a hub model"
    )


def test_folders_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert resolve_source("m", tmp_path) == str(tmp_path / "m")
    assert resolve_source("./m", tmp_path) == str(tmp_path / "m")
    assert resolve_source("org/name", tmp_path) == "org/name"
    for source in ("./n", "a/b/c", str(tmp_path / "n")):
        assert problem(resolve_source, source, tmp_path) == (
            f"model.source is {source!r}, but there is no such folder; looked at {tmp_path / source}"
        )


def test_the_sha256_of_the_weights(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("bert")
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    load(source, tmp_path, sha256=digest)
    wrong = "0" * 64
    assert problem(lambda: load(source, tmp_path, sha256=wrong)) == (
        f"{source / 'model.safetensors'}: model.safetensors has sha256 {digest}, but the recipe says {wrong}; "
        "use the version the recipe was made for"
    )
    (source / "model.safetensors").unlink()
    assert problem(lambda: load(source, tmp_path, sha256=wrong)) == (
        "model.sha256 is given, but the source has no local model.safetensors; drop it or use a folder"
    )


def test_a_pretrained_model_is_loaded_with_a_seeded_head(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("bert", num_labels=3)
    first, _ = load(source, tmp_path, seed=1)
    again, _ = load(source, tmp_path, seed=1)
    other, _ = load(source, tmp_path, seed=2)
    assert first.classifier.weight.shape == (2, 32)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


def test_an_encoder_without_pooler_gets_a_new_one(make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("bert")
    del model.bert.pooler
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path, tmp_path)
    assert torch.equal(loaded.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    ("entries", "count", "first"),
    [
        ({"num_hidden_layers": 3}, 16, "bert.encoder.layer.2.attention.output.LayerNorm.bias"),
        ({"model_type": "roberta"}, 37, "roberta.embeddings.LayerNorm.bias"),
        ({"vocab_size": 70}, 1, "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_an_encoder_of_other_weights_is_refused(
    entries: dict[str, Any], count: int, first: str, make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source("bert")
    edit_config(source, **entries)
    assert problem(load, source, tmp_path) == (
        f"the weights of '{source}' are not those its config.json describes: {count} are missing or of another "
        f"shape, the first is {first}; check the source that the recipe names"
    )


def test_what_cannot_be_loaded_is_told_in_one_line(
    make_source: MakeSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoiled(spoil: Callable[[Path], object]) -> str:
        source = make_source("bert")
        spoil(source)
        return problem(load, source, tmp_path).replace(str(source), "SOURCE")

    start = "the model 'SOURCE' cannot be loaded: "
    own_code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    assert spoiled(lambda f: (f / "model.safetensors").write_bytes(b"abc")).startswith("SOURCE/model.safetensors: ")
    assert spoiled(lambda f: (f / "config.json").write_text("{")).startswith("SOURCE/config.json: ")
    assert spoiled(lambda f: edit_config(f, model_type="unheard")).startswith(f"{start}The checkpoint you are trying")
    assert "contains custom code" in spoiled(lambda f: edit_config(f, **own_code))
    assert capsys.readouterr().out == "", "nobody was asked anything"


def test_pickled_weights_are_not_read(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("bert")
    (source / "model.safetensors").unlink()
    torch.save({}, source / "pytorch_model.bin")
    assert "no file named model.safetensors" in problem(load, source, tmp_path)


def test_an_index_names_no_weights_elsewhere(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("bert")
    shutil.move(source / "model.safetensors", source / "own.safetensors")
    shutil.copy(source / "own.safetensors", source.parent / "other.safetensors")
    index = source / "model.safetensors.index.json"
    with safe_open(source / "own.safetensors", "pt") as tensors:
        names = list(tensors.keys())

    def pointing_to(name: object) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))

    pointing_to("own.safetensors")
    load(source, tmp_path)
    absolute = str(source.parent / "other.safetensors")
    for name in ("../other.safetensors", absolute, "..", 3):
        pointing_to(name)
        message = f"{index}: names weights outside its folder: {name!r}; get the model again"
        assert problem(load, source, tmp_path) == message
    index.write_text("{")
    assert problem(load, source, tmp_path).startswith(f"{index}: is not JSON")
    for content in ("[]", '{"weight_map": []}'):
        index.write_text(content)
        assert problem(load, source, tmp_path) == f"{index}: is no index of weights; get the model again"


def test_an_adapter_is_no_model(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("bert")
    (source / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(make_source("bert"))}))
    assert "is an adapter, whose weights belong to another model" in problem(load, source, tmp_path)


def write_adapter(folder: Path, base: Path) -> Path:
    """A folder as peft saves one: a LoRA of one layer, the name of its model, a tokenizer, and no config of a model."""
    folder.mkdir()
    entries = {"base_model_name_or_path": str(base), "bias": "none", "peft_type": "LORA", "r": 2, "lora_alpha": 4,
               "target_modules": ["query"], "task_type": "SEQ_CLS", "inference_mode": True}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    return folder


@pytest.mark.parametrize("reached", ["folder", "package"])
def test_a_folder_as_peft_writes_it_is_an_adapter(
    reached: str, make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told as one, and neither as a folder without a config nor by the model that it names."""
    (tmp_path / "site" / "tuned").mkdir(parents=True)
    adapter = write_adapter(tmp_path / "site" / "tuned" / "adapter", make_source("bert"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    if reached == "package":
        (adapter.parent / "__init__.py").touch()
        shutil.copy(make_source("bert") / "config.json", adapter)  # a folder of a package is known by it
    source = str(adapter) if reached == "folder" else "package:tuned/adapter"
    line = (f"{adapter / 'adapter_config.json'}: is an adapter, whose weights belong to another model; merge them and "
            "save the whole model")  # fmt: skip
    assert problem(load, source, tmp_path) == line
    assert problem(source_digest, ModelConfig(source=source), tmp_path) == line


def test_a_folder_without_a_tokenizer(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("bert")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    alone = f"{source}: no tokenizer lies beside the model; keep its files together"
    assert problem(load, source, tmp_path) == alone
    assert problem(load_tokenizer, source, str(source)) == alone
    empty = tmp_path / "empty"
    empty.mkdir()
    lost = f"{empty}: no tokenizer lies beside the model; keep its files together"
    assert problem(load_tokenizer, empty, str(empty)) == lost


@pytest.mark.parametrize(
    ("family", "longest"), [("bert", 40), ("distilbert", 40), ("roberta", 39), ("mpnet", 38), ("deberta-v2", 40)]
)
def test_texts_longer_than_the_positions(family: str, longest: int, make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(family)
    model, _ = load(source, tmp_path, max_length=longest)
    ids = torch.full((1, longest), 7)
    with torch.no_grad():
        assert model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
    assert problem(lambda: load(source, tmp_path, max_length=longest + 1)) == (
        f"model.max_length is {longest + 1}, but the model has {longest} positions; lower it"
    )


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_dropout_is_replaced_everywhere(family: str, make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(family)
    model, _ = load(source, tmp_path, dropout=0.3)
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.3}
    kept, _ = load(source, tmp_path)
    assert {m.p for m in kept.modules() if isinstance(m, nn.Dropout)} <= {0.0, 0.1, 0.2}


def test_rates_of_zero_are_replaced_and_switches_are_not(make_model: MakeModel) -> None:
    config = make_model("bert", hidden_dropout_prob=0).config
    config.use_stable_dropout = True
    set_dropout(config, 0.2)
    assert config.hidden_dropout_prob == 0.2
    assert config.use_stable_dropout is True
    set_dropout(config, None)
    assert config.hidden_dropout_prob == 0.2


def test_a_model_comes_back_from_its_checkpoint(
    family: str, make_model: MakeModel, tokenizer: Any, batch: dict[str, Tensor]
) -> None:
    model = make_model(family, num_labels=3)
    files, weights = serialize_model(model, TextProcessor(tokenizer))
    again, words = build(Checkpoint(MANIFEST, files, weights))
    assert not again.training
    assert type(again) is type(model)
    assert {n: t.dtype for n, t in again.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in again.state_dict().items())
    assert isinstance(words, TextProcessor)
    assert words.tokenizer("red blue w3")["input_ids"] == tokenizer("red blue w3")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_captured_weights_are_copies(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model("bert")
    _, weights = serialize_model(model, TextProcessor(tokenizer))
    before = weights["classifier.weight"].clone()
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert torch.equal(weights["classifier.weight"], before)


def test_the_hooked_attention_is_not_written_down(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model("bert")
    files, _ = serialize_model(model, TextProcessor(tokenizer))
    assert use_hooked_attention(model)
    assert serialize_model(model, TextProcessor(tokenizer))[0] == files


def test_tied_weights_are_kept_once(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model("bart")
    files, weights = serialize_model(model, TextProcessor(tokenizer))
    tied = {f"model.{part}embed_tokens.weight" for part in ("encoder.", "decoder.")}
    assert set(model.state_dict()) - set(weights) == tied
    again, _ = build(Checkpoint(MANIFEST, files, weights))
    assert again.model.encoder.embed_tokens.weight is again.model.shared.weight
    assert torch.equal(again.model.shared.weight, model.model.shared.weight)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_the_config(change: str, make_model: MakeModel, tokenizer: Any) -> None:
    files, weights = serialize_model(make_model("bert"), TextProcessor(tokenizer))
    name = "bert.pooler.dense.weight"
    said = "is missing" if change == "missing" else "does not fit the config"
    if change == "missing":
        del weights[name]
    if change == "unknown":
        name = "bert.pooler.sparse.weight"
        weights[name] = torch.ones(3)
    if change == "shape":
        weights[name] = torch.ones(3)
    assert problem(build, Checkpoint(MANIFEST, files, weights), "runs/x") == (
        f"runs/x: the weight {name} {said}; the files do not belong together"
    )


def test_a_checkpoint_without_config_cannot_be_built(make_model: MakeModel, tokenizer: Any) -> None:
    files, weights = serialize_model(make_model("bert"), TextProcessor(tokenizer))
    whole = Checkpoint(MANIFEST, files, weights)
    no_config = replace(whole, files={n: c for n, c in files.items() if n != "config.json"})
    assert problem(build, no_config, "runs/x").startswith("runs/x: the checkpoint's model cannot be built: ")
    no_words = replace(whole, files={"config.json": files["config.json"]})
    assert problem(build, no_words, "runs/x") == ("runs/x: no tokenizer lies beside the model; keep its files together")
