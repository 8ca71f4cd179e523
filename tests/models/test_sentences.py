"""Sentence encoders: what sentence-transformers loads, saves and computes is the oracle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from sqat.checkpoint.manifest import Manifest
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sqat.data.batch import Processor
from sqat.data.rows import Rows
from sqat.errors import SqatError
from sqat.export.float16 import to_float16
from sqat.export.graph import export_float
from sqat.models.loading import build, load_pretrained, serialize_model
from sqat.recipe.inputs import ModelConfig
from sqat.runtime.sessions import session
from tests.tiny import WORDS, write_model

TEXTS = ["red w1 w2", "blue", "w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14", "w20 red w30 blue"]
MODULES = ("Transformer", "Pooling", "Normalize")
Encoder = tuple[Any, Processor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny AutoModel and its tokenizer, and nothing of sentence-transformers."""
    folder = tmp_path_factory.mktemp("plain")
    write_model(folder, words=WORDS, max_position_embeddings=40, initializer_range=0.2)
    return folder


def write_modules(
    folder: Path,
    pooling: dict[str, Any],
    modules: tuple[str, ...] = MODULES,
    prefix: str = "sentence_transformers.models",
) -> None:
    """Make a plain folder one of sentence-transformers."""
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{prefix}.{kind}"}
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))


@pytest.fixture
def source(plain: Path, tmp_path: Path) -> Path:
    """A copy of the plain folder that a test may change."""
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder: Path, pooling: str | None = None) -> Encoder:
    head = {"num_labels": 0, **({} if pooling is None else {"pooling": pooling})}
    model, processor = load_pretrained("sentences", ModelConfig(source=str(folder), max_length=12), Path(), head, 0)
    return model.eval(), processor


def embed(encoder: Encoder, texts: list[str]) -> Tensor:
    """Embeddings of texts in one padded batch."""
    model, processor = encoder
    rows = processor.prepare(Rows.from_dict({"text": texts, "label": [0.0] * len(texts)}), 12)
    with torch.no_grad():
        vectors: Tensor = model(**processor.collate(rows, list(range(len(rows)))).inputs).logits
    return vectors


def saved(encoder: Encoder, folder: Path) -> Path:
    files, weights = serialize_model(*encoder)
    manifest = Manifest(stage="train", type="train", fingerprint="k", base_model="tiny", seed=0)
    save_checkpoint(Checkpoint(manifest, files, weights), folder)
    return folder


def theirs(folder: Path) -> Any:
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sentence_transformers_loads_a_checkpoint_and_computes_the_same(mode: str, side: str, source: Path) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": side}))
    encoder = load(source, mode)
    folder = saved(encoder, source / "checkpoint")
    library = theirs(folder)
    ours = embed(encoder, TEXTS)
    assert ours.numpy() == pytest.approx(library.encode(TEXTS), abs=1e-6)
    assert library.max_seq_length == 12
    assert ours.norm(dim=1).tolist() == pytest.approx([1.0] * len(TEXTS))
    if side == "right":  # on the left, padding moves the positions of the tokens
        alone = torch.cat([embed(encoder, [text]) for text in TEXTS])
        assert alone.numpy() == pytest.approx(ours.numpy(), abs=1e-6)


@pytest.mark.parametrize("normalized", [True, False])
def test_what_sentence_transformers_saved_loads_and_computes_the_same(normalized: bool, source: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    models = library.sentence_transformer.modules
    transformer = library.base.modules.Transformer(str(source), max_seq_length=12)
    pooling = models.Pooling(32, "max")
    rest = [library.base.modules.Normalize()] if normalized else []
    made = library.SentenceTransformer(modules=[transformer, pooling, *rest], device="cpu")
    made.save(str(source / "theirs"))
    encoder = load(source / "theirs")
    assert embed(encoder, TEXTS).numpy() == pytest.approx(made.encode(TEXTS), abs=1e-6)
    again = theirs(saved(encoder, source / "ours"))
    assert again.encode(TEXTS) == pytest.approx(made.encode(TEXTS), abs=1e-6)


OLD = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({**OLD, "pooling_mode_cls_token": True}, "cls"),
        ({**OLD, "pooling_mode_max_tokens": True, "pooling_mode_mean_sqrt_len_tokens": False}, "max"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["max"]}, "max"),
        (OLD, "mean"),
    ],
)
def test_the_way_of_pooling_is_read_in_both_forms(pooling: dict[str, Any], mode: str, source: Path) -> None:
    wanted = embed(load(source, mode), TEXTS)
    write_modules(source, pooling)
    assert torch.equal(embed(load(source), TEXTS), wanted)
    assert not torch.equal(embed(load(source, "max" if mode == "mean" else "mean"), TEXTS), wanted)  # the recipe's word


@pytest.mark.parametrize("path", ["pool", "./1_Pooling", "a/b/c"])
def test_a_pooling_elsewhere_in_the_folder_is_read(path: str, source: Path) -> None:
    wanted = embed(load(source, "cls"), TEXTS)
    write_modules(source, {"pooling_mode": "mean"})
    pooling_at(path)(source)
    (source / path).mkdir(parents=True, exist_ok=True)
    (source / path / "config.json").write_text('{"pooling_mode": "cls"}')
    encoder = load(source)
    assert torch.equal(embed(encoder, TEXTS), wanted)
    again = build(load_checkpoint(saved(encoder, source / "checkpoint")))
    assert torch.equal(embed(again, TEXTS), wanted)


def test_without_normalize_vectors_keep_their_length(source: Path) -> None:
    wanted = embed(load(source), TEXTS)
    write_modules(source, {"pooling_mode": "mean"}, MODULES[:2])
    vectors = embed(load(source), TEXTS)
    assert bool((vectors.norm(dim=1) - 1).abs().min() > 0.1)
    assert torch.nn.functional.normalize(vectors).numpy() == pytest.approx(wanted.numpy(), abs=1e-6)
    assert "2_Normalize/config.json" not in serialize_model(*load(source))[0]


def test_a_checkpoint_comes_back_as_it_was(source: Path) -> None:
    encoder = load(source, "max")
    checkpoint = load_checkpoint(saved(encoder, source / "checkpoint"))
    again = build(checkpoint)
    files, weights = serialize_model(*again)
    assert files == checkpoint.files
    assert torch.equal(embed(again, TEXTS), embed(encoder, TEXTS))
    assert set(weights) == set(transformers.AutoModel.from_pretrained(source).state_dict())


def test_nothing_of_the_source_is_dropped(source: Path) -> None:
    write_modules(source, {"pooling_mode": "mean"})
    prompts = {"prompts": {"query": "q: "}, "default_prompt_name": None, "similarity_fn_name": "dot"}
    (source / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 5, "do_lower_case": false, "more": 1}')
    (source / "README.md").write_text("# a card\n")
    (source / "pytorch_model.bin").write_bytes(b"weights of another form")
    files, _ = serialize_model(*load(source))
    assert json.loads(files["config_sentence_transformers.json"]) == prompts
    assert json.loads(files["sentence_bert_config.json"]) == {"max_seq_length": 12, "do_lower_case": False, "more": 1}
    assert files["README.md"] == b"# a card\n"
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert there - set(files) == {"model.safetensors", "pytorch_model.bin"}


def unknown_module(folder: Path) -> None:
    write_modules(folder, {}, ("Transformer", "Pooling", "Dense"))


def weights_below(folder: Path) -> None:
    write_modules(folder, {})
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))


def other_pooling(folder: Path) -> None:
    write_modules(folder, {**OLD, "pooling_mode_lasttoken": True})


def two_poolings(folder: Path) -> None:
    write_modules(folder, {"pooling_mode": ["cls", "mean"]})


def lower_case(folder: Path) -> None:
    write_modules(folder, {})
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')


def prompt_before_all(folder: Path) -> None:
    write_modules(folder, {})
    (folder / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')


def no_pooling(folder: Path) -> None:
    write_modules(folder, {})
    (folder / "1_Pooling" / "config.json").unlink()


def pooling_at(path: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_modules(folder, {})
        modules = json.loads((folder / "modules.json").read_text())
        modules[1]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules))

    return write


def pooling_is(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_modules(folder, {})
        (folder / "1_Pooling" / "config.json").write_text(content)

    return write


def modules_are(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_modules(folder, {})
        (folder / "modules.json").write_text(content)

    return write


def no_modules(folder: Path) -> None:
    write_modules(folder, {"pooling_mode": "cls"})
    (folder / "modules.json").unlink()


def pipe(folder: Path) -> None:
    write_modules(folder, {})
    (folder / "1_Pooling" / "config.json").unlink()
    os.mkfifo(folder / "1_Pooling" / "config.json")


def other_class(folder: Path) -> None:
    write_modules(folder, {}, prefix="evil.models")


def no_json(folder: Path) -> None:
    (folder / "modules.json").write_text("[")


def weight_missing(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.0.output.dense.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (unknown_module, "the modules of the model are Transformer, Pooling, Dense; sqat reads Transformer"),
        (weights_below, "Transformer, Pooling, Normalize in '0_Transformer'"),
        (no_pooling, "1_Pooling/config.json: no such file"),
        (no_modules, "modules.json: no such file, though 1_Pooling/config.json is there"),
        (pipe, "1_Pooling/config.json: is a pipe"),
        (other_class, "evil.models.Transformer, evil.models.Pooling"),
        (pooling_at("pool/of/it"), "pool/of/it/config.json: no such file"),
        (pooling_at("../1_Pooling"), "'../1_Pooling', which is no folder inside"),
        (pooling_at("/etc"), "'/etc', which is no folder inside"),
        (pooling_at("a/../../b"), "which is no folder inside"),
        (pooling_at(""), "'', which is no folder inside"),
        (pooling_at("."), "'.', which is no folder inside"),
        (pooling_at(3), "3, which is no folder inside"),
        (pooling_is("[]"), "1_Pooling/config.json: is no JSON object"),
        (pooling_is("{"), "1_Pooling/config.json: is not JSON"),
        (pooling_is('{"pooling_mode": 3}'), "the model pools by 3"),
        (pooling_is('{"pooling_mode": []}'), "the model pools by []"),
        (pooling_is('{"pooling_mode_mean_tokens": "false"}'), "pooling_mode_mean_tokens is 'false', not true or false"),
        (pooling_is('{"pooling_mode_median": true}'), "the model pools by median"),
        (modules_are("{}"), "modules.json: is no list of modules"),
        (modules_are("[]"), "modules.json: is no list of modules"),
        (modules_are("[1, 2]"), "modules.json: is no list of modules"),
        (modules_are('[{"type": null}]'), "modules.json: is no list of modules"),
        (modules_are("[" * 50_000), "modules.json: holds lists and objects more than 100 deep"),
        (other_pooling, "the model pools by lasttoken; sqat knows mean, cls, max"),
        (two_poolings, "the model pools by cls and mean"),
        (lower_case, "do_lower_case"),
        (prompt_before_all, "the prompt 'query' before every text"),
        (no_json, "is not JSON"),
        (weight_missing, "1 are missing or of another shape, the first is encoder.layer.0.output.dense.weight"),
    ],
)
def test_what_cannot_be_read_is_one_error(damage: Callable[[Path], None], told: str, source: Path) -> None:
    damage(source)
    with pytest.raises(SqatError) as error:
        load(source)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_texts_longer_than_the_model_reads_are_refused(source: Path) -> None:
    with pytest.raises(SqatError, match="41, but the model has 40 positions"):
        load_pretrained("sentences", ModelConfig(source=str(source), max_length=41), Path(), {}, 0)


def test_a_pooler_that_nothing_reads_does_not_learn(source: Path) -> None:
    model, _ = load(source)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize("mode", ["cls", "max"])
def test_every_way_of_pooling_can_be_exported(mode: str, source: Path) -> None:
    model, processor = load(source, mode)
    model.set_attn_implementation("eager")
    rows = processor.prepare(Rows.from_dict({"text": TEXTS, "label": [0.0] * len(TEXTS)}), 12)
    inputs = processor.collate(rows, list(range(len(rows)))).inputs
    wanted = model(**inputs).logits.detach().numpy()
    graph = export_float(model, {name: tensor[:2] for name, tensor in inputs.items()}, "sentence_embedding")
    for form, tolerance in ((graph, 1e-5), (to_float16(graph), 5e-3)):
        runtime = session(form.SerializeToString())
        arrays = {entry.name: inputs[entry.name].numpy() for entry in runtime.get_inputs()}
        assert runtime.run(["sentence_embedding"], arrays)[0] == pytest.approx(wanted, abs=tolerance)
