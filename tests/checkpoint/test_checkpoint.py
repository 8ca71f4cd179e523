"""The checkpoint directory: equal after a round trip, and one line of error for everything that may be amiss."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from sqat.checkpoint import atomic_write
from sqat.checkpoint import manifest as manifests
from sqat.checkpoint import store as module
from sqat.checkpoint.manifest import LayerRecord, Manifest, SiteRecord, load_manifest, manifest_digest
from sqat.checkpoint.store import Checkpoint, load_checkpoint, read_tensors, save_checkpoint
from sqat.errors import SqatError

PACKAGE = Path(module.__file__).parent
REMAKE = "run the stage again with --force, or use another checkpoint"
FILES = (
    "config.json",
    "model.safetensors",
    "recipe.yaml",
    "sqat.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return make_checkpoint("bert", metrics={"dev": {"pnr": float("inf"), "accuracy": 1 / 3}}, notes=["ä note"])


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(checkpoint, tmp_path / "01-x")
    return tmp_path / "01-x"


def error_of(directory: Path) -> str:
    """The one line that loading a directory ends with."""
    with pytest.raises(SqatError) as caught:
        load_checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reseal(directory: Path, edit: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change the manifest as someone would who knows the format: every digest is right afterwards."""
    manifest = json.loads((directory / "sqat.json").read_text())
    for name in manifest["files"]:
        if (directory / name).is_file():
            manifest["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    edit(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    (directory / "sqat.json").write_text(json.dumps(manifest))


def rewrite(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a safetensors file and every digest that covers it."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    reseal(path.parent)


def assert_same(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
        assert tensor.dtype == others[name].dtype, name


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


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_seen(name: str, saved: Path) -> None:
    content = (saved / name).read_bytes()
    for position in {0, len(content) // 2, len(content) - 1}:
        flipped = bytearray(content)
        flipped[position] ^= 1
        (saved / name).write_bytes(bytes(flipped))
        assert error_of(saved) == (
            f"{saved / name}: the content is not what the manifest's sha256 says: "
            f"the file was changed or damaged; {REMAKE}"
        )


def test_one_flipped_byte_of_the_manifest_is_seen(saved: Path) -> None:
    path = saved / "sqat.json"
    content = path.read_bytes()
    said = set()
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 1
        path.write_bytes(bytes(flipped))
        if not is_layout(content, position):
            line = error_of(saved)
            assert line.startswith(str(saved))
            assert line.endswith((REMAKE, "upgrade sqat"))
            said.add(line.removeprefix(f"{path}: "))
    assert any(line.startswith("the manifest is not what its own") for line in said)
    assert any(line.startswith("cannot be read as JSON") for line in said)


def is_layout(content: bytes, position: int) -> bool:
    """A byte between two tokens, which JSON does not count as content."""
    flipped = bytearray(content)
    flipped[position] ^= 1
    try:
        return bool(json.loads(bytes(flipped)) == json.loads(content))
    except ValueError:
        return False


def test_a_changed_figure_of_the_manifest_is_seen(saved: Path) -> None:
    path = saved / "sqat.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    assert error_of(saved) == (
        f"{path}: the manifest is not what its own sha256 says: it was changed or damaged; {REMAKE}"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    assert error_of(saved) == (
        f"{saved / name}: a file of the checkpoint is missing or unreadable (No such file or directory); {REMAKE}"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read as JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("", "cannot be read as JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[]", "has no valid format version, got None"),
        ("{}", "has no valid format version, got None"),
        ('{"format": "1"}', "has no valid format version, got '1'"),
        ('{"format": 0}', "has no valid format version, got 0"),
        ('{"format": 1}', "the manifest's stage is not valid"),
        ('{"format": 1, "stage": 3}', "the manifest's stage is not valid"),
    ],
)
def test_a_manifest_that_is_none(content: str, problem: str, saved: Path) -> None:
    (saved / "sqat.json").write_text(content)
    assert error_of(saved) == f"{saved / 'sqat.json'}: {problem}; {REMAKE}"


def test_a_newer_format_asks_for_a_newer_sqat(saved: Path) -> None:
    reseal(saved, lambda manifest: manifest.update(format=2, novelty={"a": 1}))
    assert error_of(saved) == f"{saved / 'sqat.json'}: format 2 is newer than this sqat reads (1); upgrade sqat"


def test_a_manifest_that_is_no_text(saved: Path) -> None:
    (saved / "sqat.json").write_bytes(b"\xff\xfe\xff")
    assert error_of(saved).startswith(f"{saved / 'sqat.json'}: cannot be read as JSON (")


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda m: m.update(colour="red"), "colour"),
        (lambda m: m.update(type="polish"), "type"),
        (lambda m: m.update(seed="x"), "seed"),
        (lambda m: m["layers"][QUERY].update(dense="yes"), f"layers.{QUERY}.dense"),
        (lambda m: m["sites"].update(x={"shared_with": "x"}), "sites.x.saturated"),
    ],
)
def test_a_wrong_manifest_entry_is_named(edit: Callable[[dict[str, Any]], object], where: str, saved: Path) -> None:
    reseal(saved, edit)
    assert error_of(saved) == f"{saved / 'sqat.json'}: the manifest's {where} is not valid; {REMAKE}"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b/c/d", "a/../../secret", ".", "..", ""])
def test_a_file_outside_is_not_read(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved.parent / "secret").write_text("x")
    reseal(saved, lambda manifest: manifest.update(files={name: hashlib.sha256(b"x").hexdigest()}))
    read: list[Path] = []
    monkeypatch.setattr(manifests, "file_digest", lambda path: read.append(path) or "x")
    assert error_of(saved) == (
        f"{saved / 'sqat.json'}: the manifest names a file outside the checkpoint: {name!r}; {REMAKE}"
    )
    assert not read


@pytest.mark.parametrize("name", ["folder"])
def test_a_folder_is_no_file(name: str, saved: Path) -> None:
    (saved / name).mkdir()
    reseal(saved, lambda manifest: manifest["files"].update({name: "0" * 64}))
    assert error_of(saved) == (
        f"{saved / name}: a file of the checkpoint is missing or unreadable (Is a directory); {REMAKE}"
    )


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    give = "give the folder of a finished stage"
    assert error_of(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such checkpoint folder; {give}"
    assert error_of(tmp_path / "file") == f"{tmp_path / 'file'}: no such checkpoint folder; {give}"
    assert error_of(tmp_path) == f"{tmp_path}: the folder has no sqat.json; {give}"


@pytest.mark.parametrize("name", ["model.safetensors", "sqat.safetensors"])
def test_a_file_that_is_no_safetensors(name: str, saved: Path) -> None:
    (saved / name).write_bytes(b"\x80\x04 a pickle")
    reseal(saved)
    line = error_of(saved)
    assert line.startswith(f"{saved / name}: is not a safetensors file (")
    assert line.endswith(f"; {REMAKE}")


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
    assert error_of(saved) == f"{saved / 'sqat.safetensors'}: the mask of {QUERY} does not fit its weight; {REMAKE}"


def test_a_mask_without_a_weight(saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", replaced("nobody.mask", torch.zeros(128, dtype=torch.uint8)))
    assert error_of(saved) == f"{saved / 'sqat.safetensors'}: the mask of nobody does not fit its weight; {REMAKE}"


@pytest.mark.parametrize("value", [-0.0, 1e-30, float("nan"), -1.0])
def test_a_pruned_weight_that_is_not_zero(value: float, saved: Path, checkpoint: Checkpoint) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        row, column = (~checkpoint.masks[KEY]).nonzero()[5].tolist()
        tensors[f"{KEY}.weight"][row, column] = value

    rewrite(saved / "model.safetensors", spoil)
    assert error_of(saved) == f"{saved}: {KEY} has a pruned weight that is not +0.0; {REMAKE}"


def test_a_violated_pattern(saved: Path, checkpoint: Checkpoint) -> None:
    mask = checkpoint.masks[KEY].clone()
    mask[0, :4], mask[3, 4:8] = True, True
    rewrite(saved / "sqat.safetensors", replaced(f"{KEY}.mask", module.pack_bits(mask)))
    assert error_of(saved) == f"{saved}: {KEY} is said to be 2:4 but 2 groups keep more; {REMAKE}"


def test_a_claim_without_a_mask(saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", lambda tensors: tensors.pop(f"{KEY}.mask"))
    assert error_of(saved) == f"{saved}: {KEY} is said to be 2:4 but has no mask; {REMAKE}"


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("2 of 4", "pattern '2 of 4' is not of the form N:M, for instance 2:4"),
        ("2:5", "dimension 1 of shape (32, 32) is not a multiple of 5"),
    ],
)
def test_a_pattern_that_cannot_be(pattern: str, why: str, saved: Path) -> None:
    reseal(saved, lambda manifest: manifest["layers"][KEY].update(pattern=pattern))
    assert error_of(saved) == f"{saved}: {KEY} is said to be {pattern}, which it cannot be: {why}; {REMAKE}"


@pytest.mark.parametrize(
    "bound",
    [torch.tensor(0.0), torch.tensor(float("inf")), torch.tensor(float("nan")), torch.ones(1), torch.tensor(3)],
)
def test_a_bound_that_is_none(bound: Tensor, saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", replaced(f"{KEY}:input.amax", bound))
    assert error_of(saved) == f"{saved}: the amax of {KEY}:input is not one positive number; {REMAKE}"


def test_a_site_without_a_bound(saved: Path) -> None:
    rewrite(saved / "sqat.safetensors", lambda tensors: tensors.pop(f"{KEY}:input.amax"))
    assert error_of(saved) == f"{saved}: {KEY}:input has no amax: {KEY}:input is not in sqat.safetensors; {REMAKE}"


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
        f"{saved}: cannot be written: No space left on device; free space or choose another folder"
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
        f"{tmp_path / '01-x'}: cannot be written: Permission denied; free space or choose another folder"
    )


def test_a_write_cut_off_between_its_renames_is_undone(saved: Path, checkpoint: Checkpoint) -> None:
    saved.rename(saved.with_name(".01-x.old"))
    saved.with_name(".01-x.new").mkdir()
    before = snapshot(saved.with_name(".01-x.old"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_write, "sync", lambda path: (_ for _ in ()).throw(OSError(5, "I/O error")))
        with pytest.raises(SqatError, match="I/O error"):
            save_checkpoint(checkpoint, saved)
    assert snapshot(saved) == before
    save_checkpoint(replace(checkpoint, recipe="new"), saved)
    assert load_checkpoint(saved).recipe == "new"
    assert [path.name for path in saved.parent.iterdir()] == ["01-x"]


def test_saving_replaces_what_was_there(saved: Path, checkpoint: Checkpoint) -> None:
    (saved / "model.int8.onnx").write_text("of an older run")
    save_checkpoint(replace(checkpoint, recipe="new"), saved)
    assert not (saved / "model.int8.onnx").exists()
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
    assert "packed/config.json: the content is not what the manifest's sha256 says" in error_of(tmp_path / "more")


def test_tensors_are_read_by_name(tmp_path: Path) -> None:
    """What is made of them (parameters, sums over them) must not depend on the order in which a file gives them."""
    save_file({f"n{number}": torch.zeros(1) for number in range(20)}, tmp_path / "x.safetensors")
    for _ in range(3):
        assert list(read_tensors(tmp_path / "x.safetensors")) == sorted(f"n{number}" for number in range(20))


@pytest.mark.parametrize("wrong", [None, [], {}, "many"])
def test_a_figure_that_is_none_is_told_in_one_line(saved: Path, wrong: object) -> None:
    raw = json.loads((saved / "sqat.json").read_text())
    raw["history"] = [{"ndcg@10": wrong}]
    (saved / "sqat.json").write_text(json.dumps(raw))
    with pytest.raises(SqatError, match=r"the manifest's history\.0\.ndcg@10 is not valid"):
        load_manifest(saved)
