"""The checkpoint folder: equal after a round trip, and one error for each damage."""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sqat.checkpoint import store as module
from sqat.checkpoint.manifest import LayerRecord, Manifest, SiteRecord, load_manifest
from sqat.checkpoint.store import Checkpoint, load_checkpoint, read_tensors, save_checkpoint
from sqat.errors import SqatError
from sqat.files import replace as replace_door
from tests.checkpoint.conftest import FILES, KEY, QUERY, assert_damaged, assert_same, reseal, rewrite

PACKAGE = Path(module.__file__).parent


def test_what_is_loaded_is_what_was_saved(checkpoint: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert sorted(path.name for path in saved.iterdir()) == sorted([*FILES, "sqat.json"])
    assert loaded.files == checkpoint.files
    assert loaded.recipe == checkpoint.recipe
    assert_same(loaded.weights, checkpoint.weights)
    assert_same(loaded.masks, checkpoint.masks)
    assert_same(loaded.amax, checkpoint.amax)
    digests = {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in FILES}
    assert loaded.manifest.files == digests
    assert loaded.manifest.metrics["dev"] == {"pnr": float("inf"), "accuracy": 1 / 3}
    assert loaded.manifest.model_copy(update={"files": {}, "sha256": ""}) == checkpoint.manifest
    assert load_manifest(saved) == loaded.manifest


def test_saving_is_repeatable_to_the_byte(checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(saved), tmp_path / "again")
    for name in (*FILES, "sqat.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_a_dense_checkpoint_has_no_state_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    manifest = Manifest(stage="train", type="train", fingerprint="k", base_model="tiny", seed=0)
    save_checkpoint(Checkpoint(manifest, checkpoint.files, checkpoint.weights), tmp_path / "dense")
    assert not (tmp_path / "dense" / "sqat.safetensors").exists()
    loaded = load_checkpoint(tmp_path / "dense")
    assert loaded.masks == {}
    assert loaded.amax == {}


@pytest.mark.parametrize("shape", [(8, 16), (8, 12), (3, 20)])
def test_masks_of_any_size_come_back(shape: tuple[int, int], tmp_path: Path) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    weights = {"a.weight": torch.ones(shape) * mask}
    manifest = Manifest(stage="p", type="prune", fingerprint="k", base_model="b", seed=0)
    save_checkpoint(Checkpoint(manifest, weights=weights, masks={"a": mask}), tmp_path / "c")
    assert_same(load_checkpoint(tmp_path / "c").masks, {"a": mask})


def test_transformers_loads_the_directory(
    saved: Path, checkpoint: Checkpoint, make_model: Callable[..., PreTrainedModel], batch: dict[str, Tensor]
) -> None:
    model, report = AutoModelForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(model.state_dict(), checkpoint.weights)
    encoder = AutoModel.from_pretrained(saved)
    words = AutoTokenizer.from_pretrained(saved)
    assert words("red w1")["input_ids"] == [2, 5, 8, 3]
    reference = make_model("bert")
    reference.load_state_dict(checkpoint.weights)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, reference(**batch).logits)
        hidden = encoder.eval()(**batch).last_hidden_state
        assert torch.equal(hidden, reference.bert(**batch).last_hidden_state)


@pytest.mark.parametrize("name", ["model.safetensors", "sqat.safetensors"])
def test_a_file_that_is_no_safetensors(name: str, saved: Path) -> None:
    (saved / name).write_bytes(b"\x80\x04 a pickle")
    reseal(saved)
    assert_damaged(saved, saved / name)


def replaced(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(127, dtype=torch.uint8),
        torch.zeros(129, dtype=torch.uint8),
        torch.zeros(128, dtype=torch.int8),
        torch.zeros(8, 16, dtype=torch.uint8),
    ],
    ids=["short", "long", "type", "shape"],
)
def test_a_mask_that_does_not_fit(mask: Tensor, saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", replaced(f"{QUERY}.mask", mask))
    assert_damaged(saved, saved / "sqat.safetensors")


def test_a_mask_without_a_weight(saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", replaced("nobody.mask", torch.zeros(128, dtype=torch.uint8)))
    assert_damaged(saved, saved / "sqat.safetensors")


@pytest.mark.parametrize("value", [-0.0, 1e-30, float("nan"), -1.0])
def test_a_pruned_weight_that_is_not_zero(value: float, saved: Path, checkpoint: Checkpoint) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        row, column = (~checkpoint.masks[KEY]).nonzero()[5].tolist()
        tensors[f"{KEY}.weight"][row, column] = value

    rewrite(saved / "model.safetensors", spoil)
    assert KEY in assert_damaged(saved, saved).problem


def test_a_violated_pattern(saved: Path, checkpoint: Checkpoint) -> None:
    mask = checkpoint.masks[KEY].clone()
    mask[0, :4], mask[3, 4:8] = True, True
    rewrite(saved / "sqat.safetensors", replaced(f"{KEY}.mask", module.pack_bits(mask)))
    assert KEY in assert_damaged(saved, saved).problem


def test_a_claim_without_a_mask(saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", lambda tensors: tensors.pop(f"{KEY}.mask"))
    assert KEY in assert_damaged(saved, saved).problem


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("2 of 4", "pattern '2 of 4' is not of the form N:M, for instance 2:4"),
        ("2:5", "dimension 1 of shape (32, 32) is not a multiple of 5"),
    ],
)
def test_a_pattern_that_cannot_be(pattern: str, why: str, saved: Path) -> None:
    reseal(saved, lambda manifest: manifest["layers"][KEY].update(pattern=pattern))
    assert KEY in assert_damaged(saved, saved).problem


@pytest.mark.parametrize(
    "amax",
    [torch.tensor(0.0), torch.tensor(float("inf")), torch.tensor(float("nan")), torch.ones(1), torch.tensor(3)],
)
def test_an_amax_that_is_not_positive(amax: Tensor, saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", replaced(f"{KEY}:input.amax", amax))
    assert KEY in assert_damaged(saved, saved).problem


def test_a_site_without_an_amax(saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", lambda tensors: tensors.pop(f"{KEY}:input.amax"))
    assert KEY in assert_damaged(saved, saved).problem


@pytest.mark.parametrize("spoil", ["zero", "pattern", "weight"])
def test_a_false_claim_is_not_saved(spoil: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights, masks = dict(checkpoint.weights), dict(checkpoint.masks)
    if spoil == "zero":
        weights[f"{KEY}.weight"] = torch.where(masks[KEY], weights[f"{KEY}.weight"], -0.0)
    if spoil == "pattern":
        masks[KEY] = torch.ones_like(masks[KEY])
    if spoil == "weight":
        del weights[f"{KEY}.weight"]
    with pytest.raises(SqatError, match=re.escape(KEY)):
        save_checkpoint(replace(checkpoint, weights=weights, masks=masks), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
def test_a_failed_write_leaves_the_old_checkpoint(
    call: str, saved: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(saved.parent)
    full = OSError(28, "No space left on device")

    def fail(*arguments: object, **options: object) -> None:
        raise full

    rename = Path.rename

    def fail_on_fresh(path: Path, target: Path) -> Path:
        if path.name == ".01-x.new":
            raise full
        return rename(path, target)

    if call == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    if call == "write":
        monkeypatch.setattr(module, "write_synced", fail)
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if call == "rename":
        monkeypatch.setattr(Path, "rename", fail_on_fresh)
    with pytest.raises(SqatError) as caught:
        save_checkpoint(replace(checkpoint, recipe="new"), saved)
    assert str(caught.value) == (
        f"{saved}: cannot be written: No space left on device; free space, or choose another place"
    )
    assert snapshot(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["01-x"]


def test_a_parent_that_is_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(SqatError) as caught:
        save_checkpoint(checkpoint, tmp_path / "runs" / "01-x")
    assert str(caught.value).startswith(f"{tmp_path / 'runs' / '01-x'}: cannot be written: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SqatError) as caught:
        save_checkpoint(checkpoint, tmp_path / "01-x")
    tmp_path.chmod(0o700)
    assert str(caught.value) == (
        f"{tmp_path / '01-x'}: cannot be written: Permission denied; free space, or choose another place"
    )


def test_a_write_cut_off_between_its_renames_is_undone(saved: Path, checkpoint: Checkpoint) -> None:
    saved.rename(saved.with_name(".01-x.old"))
    saved.with_name(".01-x.new").mkdir()
    before = snapshot(saved.with_name(".01-x.old"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replace_door, "sync", lambda path: (_ for _ in ()).throw(OSError(5, "I/O error")))
        with pytest.raises(SqatError, match="I/O error"):
            save_checkpoint(checkpoint, saved)
    assert snapshot(saved) == before
    save_checkpoint(replace(checkpoint, recipe="new"), saved)
    assert load_checkpoint(saved).recipe == "new"
    assert [path.name for path in saved.parent.iterdir()] == ["01-x"]


def test_saving_replaces_what_was_there(saved: Path, checkpoint: Checkpoint) -> None:
    (saved.parent / "exported").write_text("of an older run")
    artifacts = dict.fromkeys(("model.int8.onnx", "folder/model.onnx"), saved.parent / "exported")
    save_checkpoint(replace(checkpoint, artifacts=artifacts), saved)
    assert (saved / "folder/model.onnx").exists()
    save_checkpoint(replace(checkpoint, recipe="new"), saved)
    assert not [*saved.rglob("*.onnx")]
    assert load_checkpoint(saved).recipe == "new"


def test_an_export_has_no_weights_and_keeps_its_claims(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layers = {"a": LayerRecord(pattern="2:4", quantized=True)}
    sites = {"a:input": SiteRecord(shared_with="a:input", saturated=0.0)}
    manifest = Manifest(
        stage="e",
        type="export",
        fingerprint="k",
        base_model="b",
        seed=0,
        layers=layers,
        sites=sites,
        placement="linear",
    )
    (tmp_path / "new.onnx").write_bytes(b"bytes")
    artifacts = {"model.int8.onnx": tmp_path / "new.onnx", "packed/config.json": tmp_path / "new.onnx"}
    save_checkpoint(Checkpoint(manifest, artifacts=artifacts), tmp_path / "e")
    loaded = load_checkpoint(tmp_path / "e")
    assert loaded.weights == {}
    assert loaded.artifacts == {"model.int8.onnx": tmp_path / "e" / "model.int8.onnx"}
    assert loaded.artifacts["model.int8.onnx"].read_bytes() == b"bytes"
    assert loaded.files == {"packed/config.json": b"bytes"}
    assert loaded.manifest.layers == layers


UNSAFE = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not UNSAFE & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
            assert any(keyword.arg == "allow_pickle" for keyword in node.keywords)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"


def test_files_in_a_folder_of_their_own(saved: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved)
    more = replace(checkpoint, files={**checkpoint.files, "packed/config.json": b"{}", "packed/one/config.json": b"1"})
    save_checkpoint(more, tmp_path / "more")
    assert (tmp_path / "more" / "packed" / "one" / "config.json").read_bytes() == b"1"
    assert load_checkpoint(tmp_path / "more").files == more.files
    (tmp_path / "more" / "packed" / "config.json").write_text("[]")
    assert_damaged(tmp_path / "more", tmp_path / "more" / "packed" / "config.json")


def test_tensors_are_read_by_name(tmp_path: Path) -> None:
    """What is made of them (parameters, sums over them) must not depend on the order in which a file gives them."""
    save_file({f"n{number}": torch.zeros(1) for number in range(20)}, tmp_path / "x.safetensors")
    for _ in range(3):
        assert list(read_tensors(tmp_path / "x.safetensors")) == sorted(f"n{number}" for number in range(20))
