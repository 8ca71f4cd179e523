"""The architecture diffusion: what a UNet is made to read and to say, its checkpoint, and mistakes of a recipe."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from datasets import Dataset
from onnx import TensorProto, numpy_helper
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from sqat.checkpoint.manifest import Manifest  # noqa: E402
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint  # noqa: E402
from sqat.cli import main  # noqa: E402
from sqat.errors import SqatError  # noqa: E402
from sqat.export.float16 import to_float16  # noqa: E402
from sqat.export.graph import export_float  # noqa: E402
from sqat.models import diffusion  # noqa: E402
from sqat.models.captions import Captions  # noqa: E402
from sqat.models.diffusion import CaptionedImages, Diffusion, add_patch_hooks_, from_config  # noqa: E402
from sqat.models.layer_selection import choose_layers, is_convolutional  # noqa: E402
from sqat.models.loading import build, load_pretrained, serialize_model  # noqa: E402
from sqat.models.rectified_flow import fixed_draws, on_path  # noqa: E402
from sqat.recipe.inputs import Columns, ModelConfig, SplitConfig  # noqa: E402
from sqat.recipe.stages import Layers  # noqa: E402
from sqat.recipe.tasks import TextToImageTask  # noqa: E402
from sqat.runtime.sessions import session  # noqa: E402
from sqat.tasks.splits import load_rows  # noqa: E402
from sqat.tasks.text_to_image import TextToImage  # noqa: E402
from tests.pipeline.shipped import run_shipped  # noqa: E402
from tests.tiny import write_model  # noqa: E402

WIDTH, SIDE, TOKENS = 16, 8, 5
UNET: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": WIDTH,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text encoder of random weights, and its words."""
    folder = tmp_path_factory.mktemp("encoder")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 1, "intermediate_size": 16, "max_position_embeddings": 12}
    write_model(folder, words=["red", "blue", "square", "large"], **shape)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("pictures")
    pictures = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    names = np.array(["red square", "blue square", "large red square", "blue"])
    np.savez(folder / "some.npz", x=pictures, names=names)
    return load_rows(SplitConfig(path="some.npz"), "train", Columns(image="x", text="names"), TextToImageTask(), folder)


def recipe_model(encoder: Path, **entries: Any) -> ModelConfig:
    return ModelConfig(config={**UNET, **entries}, text_encoder=encoder.name, max_length=TOKENS)


def started(encoder: Path) -> tuple[torch.nn.Module, CaptionedImages]:
    model, processor = load_pretrained("diffusion", recipe_model(encoder), encoder.parent, {}, 0)
    assert isinstance(processor, CaptionedImages)
    return model.eval(), processor


def inputs(batch: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(TOKENS) < torch.tensor([TOKENS, 2, 0])[:, None]).float()
    return {
        "sample": torch.randn(batch, 3, SIDE, SIDE),
        "timestep": torch.tensor([[0.0], [0.3], [0.9]]),
        "encoder_hidden_states": torch.randn(batch, TOKENS, WIDTH) * mask[..., None],
        "encoder_attention_mask": mask,
    }


def test_it_is_diffusers_unet_on_patches_with_the_mean_state_as_class() -> None:
    """The same weights without the hooks, called as diffusers has it, patches cut by hand."""
    torch.manual_seed(0)
    plain = diffusers.UNet2DConditionModel.from_config(UNET).eval()
    hooked = from_config(UNET).eval()
    hooked.load_state_dict(plain.state_dict())
    given = inputs()
    patches = given["sample"].reshape(3, 3, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(3, 12, 4, 4)
    states, mask = given["encoder_hidden_states"], given["encoder_attention_mask"]
    means = torch.stack([states[0].mean(dim=0), states[1, :2].mean(dim=0), torch.zeros(WIDTH)])
    with torch.no_grad():
        expected = plain(patches, torch.tensor([0.0, 300.0, 900.0]), states, class_labels=means,
                         encoder_attention_mask=mask).sample  # fmt: skip
        drawn = add_patch_hooks_(hooked)(**given).logits
    whole = expected.reshape(3, 3, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(3, 3, SIDE, SIDE)
    torch.testing.assert_close(drawn, whole)


def test_a_checkpoint_is_read_back_and_by_diffusers(encoder: Path, tmp_path: Path) -> None:
    model, processor = started(encoder)
    files, weights = serialize_model(model, processor)
    manifest = Manifest(stage="train", type="train", fingerprint="0" * 64, base_model="unet", seed=0, versions={})
    save_checkpoint(Checkpoint(manifest, files, weights), tmp_path / "checkpoint")
    again, reader = build(load_checkpoint(tmp_path / "checkpoint"))
    assert reader == processor
    plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, plain.state_dict()[name])
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs()).logits, model(**inputs()).logits)
    assert not [name for name in files if name.endswith(".safetensors")], "the encoder is not copied"


def test_convolutions_and_linears_are_pruned_but_the_outermost(encoder: Path) -> None:
    model, _ = started(encoder)
    assert is_convolutional(model)
    choice = choose_layers(model, Layers(), "prune")
    kinds = {type(model.get_submodule(name)) for name in choice.chosen}
    assert kinds >= {torch.nn.Conv2d, torch.nn.Linear}
    assert set(choice.skipped) >= {"conv_in", "conv_out"}
    assert all(choice.skipped.values())


def test_captions_are_read_as_the_encoder_reads_them_alone(encoder: Path) -> None:
    states, mask, cut = Captions.of(str(encoder), TOKENS).read(["red square", "blue"])
    model = transformers.BertModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        alone = model(torch.tensor([[2, 6, 3]])).last_hidden_state[0]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    torch.testing.assert_close(states[1, :3], alone, atol=1e-5, rtol=1e-4)
    assert float(states[1, 3:].abs().sum()) == 0
    assert cut == [False, False]


def test_captions_that_are_cut_are_counted_aloud(encoder: Path, rows: Dataset) -> None:
    """Four tokens: [CLS], two words, [SEP]; one caption has three words."""
    prepared = CaptionedImages(SIDE, Captions.of(str(encoder), 4)).prepare(rows, 99)
    assert TextToImage().data_warnings(prepared) == ["1 of 4 captions are longer than model.max_length: cut"]
    assert TextToImage().data_warnings(started(encoder)[1].prepare(rows, 99)) == []


def test_training_draws_anew_and_repeats_from_the_same_state(encoder: Path, rows: Dataset) -> None:
    _, processor = started(encoder)
    prepared = processor.prepare(rows, 99)
    torch.manual_seed(3)
    one, other = processor.collate(prepared, [0, 1]), processor.collate(prepared, [0, 1])
    torch.manual_seed(3)
    again = processor.collate(prepared, [0, 1])
    assert torch.equal(one.labels, other.labels)
    assert not torch.equal(one.inputs["sample"], other.inputs["sample"])
    assert all(torch.equal(one.inputs[name], again.inputs[name]) for name in one.inputs)


def test_captions_are_dropped_whole_and_in_training_alone(encoder: Path, rows: Dataset) -> None:
    _, processor = started(encoder)
    prepared = processor.prepare(rows, 99)
    torch.manual_seed(0)
    batches = [processor.collate(prepared, [0, 1, 2, 3]).inputs for _ in range(300)]
    masks = torch.cat([batch["encoder_attention_mask"].sum(dim=1) for batch in batches])
    states = torch.cat([batch["encoder_hidden_states"].abs().sum(dim=(1, 2)) for batch in batches])
    assert torch.equal(masks == 0, states == 0)
    assert float((masks == 0).float().mean()) == pytest.approx(0.1, abs=0.03)
    measured = processor.collate(TextToImage().evaluation_rows(prepared), [0, 1, 2, 3] * 50).inputs
    assert bool((measured["encoder_attention_mask"].sum(dim=1) > 0).all())


def test_measured_rows_have_noise_and_time_of_their_own(encoder: Path, rows: Dataset) -> None:
    _, processor = started(encoder)
    prepared = processor.prepare(TextToImage().evaluation_rows(rows), 99)
    one, other = processor.collate(prepared, [2, 0]), processor.collate(prepared, [0, 1, 2])
    noise, time = fixed_draws([2], (3, SIDE, SIDE))
    picture = torch.from_numpy(np.frombuffer(rows[2]["pixels"], np.uint8).reshape(SIDE, SIDE, 3).copy())
    expected = on_path(picture.permute(2, 0, 1)[None] / 127.5 - 1, noise, time)
    torch.testing.assert_close(one.inputs["sample"][:1], expected)
    assert torch.equal(one.inputs["sample"][0], other.inputs["sample"][2])
    assert torch.equal(one.inputs["timestep"][1], other.inputs["timestep"][0])


def test_it_learns_a_picture_from_its_caption(encoder: Path, rows: Dataset) -> None:
    model, processor = started(encoder)
    task = TextToImage()
    prepared, judged = processor.prepare(rows, 99), processor.prepare(task.evaluation_rows(rows), 99)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def explained() -> float:
        with torch.no_grad():
            return task.metrics(model(**processor.collate(judged, [0, 1, 2, 3]).inputs).logits, judged)["explained"]

    before = explained()
    torch.manual_seed(0)
    for _ in range(150):
        batch = processor.collate(prepared, [0, 1, 2, 3])
        task.loss(model(**batch.inputs).logits, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert explained() > max(0.3, before + 0.3)


def graph(body: str, inputs: str, **values: Any) -> onnx.ModelProto:
    """A graph from text, ending in ``logits``; types of what lies between are inferred."""
    text = f'<ir_version: 9, opset_import: ["" : 20]>\nagraph ({inputs}) => (float[N, M] logits) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in values.items())
    for node in model.graph.node:
        node.name = f"/some/{node.op_type}_{node.output[0]}"
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def test_times_keep_their_angles_in_float16() -> None:
    """Half has steps of 0.5 at 900: a sine of it would be noise."""
    body = "p = Mul(time, thousand) a = Mul(p, frequency) s = Sin(a) logits = Mul(s, weight)"
    values = {"thousand": np.float32(1000), "frequency": np.array([[1.0, 0.3]], np.float32), "weight": np.float32(2)}
    half = to_float16(graph(body, "float[N, 1] time", **values))
    time = np.array([[0.0], [0.5003], [0.9512]], np.float32)
    got = session(half.SerializeToString()).run(None, {"time": time})[0]
    wanted = 2 * np.sin(1000 * time.astype(np.float64) * values["frequency"])
    np.testing.assert_allclose(got, wanted, atol=3e-3)
    assert np.abs(2 * np.sin(np.float16(1000) * time.astype(np.float16)) - wanted).max() > 0.1
    assert any(tensor.data_type == TensorProto.FLOAT16 for tensor in half.graph.initializer), "the rest is in half"


def test_resizing_keeps_the_type_of_its_scales() -> None:
    body = 'x = Mul(small, weight) y = Resize<mode = "nearest">(x, , scales) logits = Squeeze(y, axes)'
    values = {"weight": np.float32(1), "scales": np.array([1, 1, 2, 2], np.float32), "axes": np.array([0, 1])}
    half = to_float16(graph(body, "float[1, 1, H, W] small", **values))
    small = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    got = session(half.SerializeToString()).run(None, {"small": small})[0]
    assert np.array_equal(got, small[0, 0].repeat(2, axis=0).repeat(2, axis=1))


RECIPE = """
model: {text_encoder: ENCODER, max_length: 5, config: UNET}
task: text-to-image
output: OUTPUT
data: {train: some.npz, dev: some.npz, columns: {image: x, text: names}}
stages:
  train: {steps: 2, batch_size: 2}
  prune: {steps: 4, batch_size: 2, distill: {minilm_weight: 0, output_weight: 1.0}}
"""


@pytest.mark.pipeline
def test_a_recipe_prunes_convolutions_along_their_input_channels(encoder: Path, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    np.savez(tmp_path / "some.npz", x=pictures, names=np.array(["red", "blue", "large red", "square"]))
    words = {"ENCODER": str(encoder), "UNET": json.dumps(UNET), "OUTPUT": str(tmp_path / "runs")}
    text = RECIPE
    for name, value in words.items():
        text = text.replace(name, value)
    (tmp_path / "tiny.yaml").write_text(text)
    torch.set_num_threads(1)
    assert main(["run", str(tmp_path / "tiny.yaml"), "--quiet"]) == 0
    pruned = load_checkpoint(tmp_path / "runs" / "tiny" / "02-prune")
    records = pruned.manifest.layers
    kernel = pruned.weights["mid_block.resnets.0.conv1.weight"]
    assert records["mid_block.resnets.0.conv1"].pattern == "2:4"
    groups = kernel.permute(0, 2, 3, 1).reshape(-1, 4)
    assert bool(((groups != 0).sum(dim=1) <= 2).all())
    assert float((kernel == 0).float().mean()) == pytest.approx(0.5)
    assert records["conv_in"].dense_because == "first or last layer of the network"
    assert set(pruned.manifest.losses) == {"task", "logits"}


@pytest.mark.pipeline
def test_the_shipped_recipe_runs(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe as shipped but for the widths of its models, the pictures and the length of its fits."""
    small = {"sample_size": 2, "block_out_channels": [16, 32], "norm_num_groups": 8, "attention_head_dim": 2}
    small |= {"cross_attention_dim": WIDTH, "projection_class_embeddings_input_dim": WIDTH}
    overrides = [f"model.config.{key}={value}" for key, value in small.items()]
    overrides += [f"model.text_encoder={encoder}", "model.max_length=5", "stages.train.evaluate_every=null"]
    for seed, split in enumerate(("train", "dev", "test")):
        pictures = np.random.default_rng(seed).integers(0, 256, (8, SIDE, SIDE, 3), np.uint8)
        np.savez(tmp_path / f"{split}.npz", x=pictures, names=np.array(["red", "blue", "large red", "square"] * 2))
        overrides.append(f"data.{split}.path={tmp_path / f'{split}.npz'}")
    rows = run_shipped("text-to-image", tmp_path, overrides, capsys, steps=2)
    assert all("explained" in row["metrics"] for row in rows)


@pytest.mark.slow
def test_exported_in_both_types_it_draws_the_same(encoder: Path) -> None:
    model, _ = started(encoder)
    graphs = [float_graph := export_float(model, inputs(), Diffusion.output), to_float16(float_graph)]
    arrays = {name: tensor.numpy() for name, tensor in inputs().items()}
    with torch.no_grad():
        wanted = model(**inputs()).logits.numpy()
    for exported, bound in zip(graphs, (1e-5, 1e-2), strict=True):
        assert [output.name for output in exported.graph.output] == ["picture"]
        got = session(exported.SerializeToString()).run(None, arrays)[0]
        np.testing.assert_allclose(got, wanted, atol=bound)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"in_channels": 13}, "in_channels 13"),
        ({"out_channels": 3}, "out_channels 3"),
        ({"sample_size": 5}, "sample_size 5, which 1 levels of the UNet cannot halve"),
        ({"sample_size": None}, "sample_size None"),
        ({"block_out_chanels": [16]}, "'block_out_chanels', which a UNet2DConditionModel does not know"),
        ({"norm_num_groups": 7}, "the UNet of model.config cannot be built"),
        ({"cross_attention_dim": 8}, "cross_attention_dim 8, the text encoder's states have 16"),
    ],
)
def test_a_wrong_config_is_told(encoder: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(SqatError, match=message):
        load_pretrained("diffusion", recipe_model(encoder, **entries), encoder.parent, {}, 0)


def test_pictures_of_another_size_are_told(encoder: Path, rows: Dataset) -> None:
    processor = CaptionedImages(16, Captions.of(str(encoder), TOKENS))
    with pytest.raises(SqatError, match="8 x 8 with 3 channels, the model draws 16 x 16") as caught:
        processor.prepare(rows, 99)
    assert caught.value.place == "some.npz:row 1"


def test_a_missing_text_encoder_is_told(encoder: Path) -> None:
    with pytest.raises(SqatError, match="needs something that reads the captions"):
        load_pretrained("diffusion", ModelConfig(config=UNET), encoder.parent, {}, 0)
    nowhere = ModelConfig(config=UNET, text_encoder="package:no_such_package/model")
    with pytest.raises(SqatError, match="no package 'no_such_package'"):
        load_pretrained("diffusion", nowhere, encoder.parent, {}, 0)


def test_another_text_encoder_than_the_model_learned_with_is_refused(encoder: Path) -> None:
    with pytest.raises(SqatError, match="the model learned with 000"):
        Captions(str(encoder), TOKENS, "0" * 64).read(["red"])


def test_a_damaged_captions_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(UNET))
    (tmp_path / diffusion.CAPTIONS).write_text("{}")
    with pytest.raises(SqatError, match=r"no sound captions\.json"):
        Diffusion().processor(tmp_path, "somewhere")


def test_a_missing_extra_is_one_line(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("diffusers"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SqatError, match="text to image needs diffusers") as caught:
        load_pretrained("diffusion", recipe_model(encoder), encoder.parent, {}, 0)
    assert caught.value.hint == "pip install 'sqat[diffusion]'"
