"""Whatever stands in a recipe or a manifest: it is read, or told in one line; nothing outside the checkpoint is read.

``SQAT_FUZZ=100000`` tries that many inputs of each kind; `scripts/faults/fuzz` tries more formats.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.faults.fuzzing import __main__ as fuzzing
from scripts.faults.fuzzing import warm, worker
from scripts.faults.fuzzing.generators import GENERATORS
from scripts.faults.fuzzing.onnx_files import quantized_layer
from sqat.checkpoint.manifest import MANIFEST, load_manifest, manifest_digest
from sqat.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from sqat.errors import GateError, SqatError
from sqat.models.loading import load_pretrained
from sqat.onnx_files import check_process
from sqat.onnx_files.checks import light_copy
from sqat.recipe.inputs import ModelConfig
from sqat.recipe.loader import load_recipe

COUNT = int(os.environ.get("SQAT_FUZZ", "100"))
fuzzed = settings(max_examples=COUNT, database=None, suppress_health_check=list(HealthCheck))
ROOT = Path(__file__).parents[2]
RECIPES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))]
PIECES = ["&a ", "*a", "<<: *a", "!!python/object:os.system ", "!x ", "{", "}", "[", "]", ": ", "- ", "? ", "\n", "\t"]
PIECES += ["'", '"', "|\n", "---\n", "%YAML 1.1\n", "\x00", "\ud800", "\ufeff", "null", "1e999", "-1", "#", "\r", "é"]
PIECES += ["0x" + "f" * 400, "9" * 400, "stages", "gates: {f1: {min: ", "retry: {times: 3}", "[" * 60, "{a: " * 60, "𝄞"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OUTSIDE = [
    "../secret",
    "/etc/hostname",
    "a/../../secret",
    "..",
    ".",
    "",
    "a//b",
    "a\x00b",
    "./secret",
    "a/b/c/d",
    "\ud800",
]
OUTSIDE += ["x" * 5000]


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """A shipped recipe with pieces cut out and put in; or pieces alone."""
    text = draw(st.sampled_from([*RECIPES, ""]))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 3, 30, 300])))
        text = text[:start] + draw(st.sampled_from(PIECES) | st.text(max_size=6)) + text[end:]
    return text


def told(read: Callable[[Path], object], path: Path) -> bool:
    """Whether the reader refuses what is there, in one line."""
    try:
        read(path)
    except SqatError as error:
        if "\n" in str(error) or error.exit_code != 2:
            pytest.fail(f"not one line: {error}")
        return True
    return False


@fuzzed
@given(text=recipes())
def test_any_recipe_is_read_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    told(load_recipe, path)


@pytest.fixture(scope="module")
def saved(make_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A checkpoint's folder and its manifest."""
    folder = tmp_path_factory.mktemp("fuzz") / "01-calibrate"
    save_checkpoint(make_checkpoint(), folder)
    (folder.parent / "secret").write_text("not for you")
    return folder, (folder / MANIFEST).read_bytes()


@fuzzed
@given(data=st.data())
def test_any_bytes_of_a_manifest_are_read_or_refused(data: st.DataObject, saved: tuple[Path, bytes]) -> None:
    folder, content = saved
    start = data.draw(st.integers(0, len(content)))
    end = start + data.draw(st.sampled_from([0, 1, 20, len(content)]))
    new = data.draw(st.binary(max_size=12) | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 9000, b"NaN"]))
    changed = content[:start] + new + content[end:]
    (folder / MANIFEST).write_bytes(changed)
    if told(load_manifest, folder):
        return
    same = {key: value for key, value in json.loads(changed).items() if key != "sha256"}
    assert same == {key: value for key, value in json.loads(content).items() if key != "sha256"}


def test_a_name_with_a_line_break_is_reported_in_one_line(saved: tuple[Path, bytes]) -> None:
    """Found by the tests below, once in some thousand inputs: pydantic's place of a mistake holds users' own keys."""
    folder, content = saved
    raw: dict[str, Any] = json.loads(content)
    raw["a\nb\x1b[31m\u2028"] = 1
    raw["sha256"] = manifest_digest(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(SqatError) as caught:
        load_checkpoint(folder)
    assert r"a\nb\x1b[31m\u2028 is not valid" in str(caught.value)
    assert str(caught.value).isprintable()


@fuzzed
@given(data=st.data())
def test_any_signed_manifest_is_read_or_refused(data: st.DataObject, saved: tuple[Path, bytes]) -> None:
    """Whoever knows the digest may write any value and any name: none of them reads or opens what is outside."""
    folder, content = saved
    raw: dict[str, Any] = json.loads(content)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*raw, "unknown"]))
        raw[key] = data.draw(VALUES)
    if data.draw(st.booleans()):
        raw["files"] = {data.draw(st.sampled_from(OUTSIDE)): "0" * 64}
    raw["sha256"] = manifest_digest(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))
    told(load_checkpoint, folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_outside_is_refused_before_it_is_opened(
    name: str, saved: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, content = saved
    raw: dict[str, Any] = json.loads(content)
    raw["files"] = {name: "0" * 64}
    raw["sha256"] = manifest_digest(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))
    opened: list[Path] = []
    true = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (opened.append(self), true(self))[1])
    with pytest.raises(SqatError):
        load_checkpoint(folder)
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in opened)


def test_an_alias_bomb_is_reported_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(SqatError, match="holds more than 10000 values once its aliases are followed"):
        load_recipe(tmp_path / "bomb.yaml")


def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    """Each generator makes inputs of both outcomes."""
    inputs, figures = 500, tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "scripts.faults.fuzzing", "--inputs", str(inputs), "--json", str(figures)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    kinds = json.loads(figures.read_text())["kinds"]
    assert {kind: counts["accepted"] + counts["refused"] for kind, counts in kinds.items()} == {
        kind: fuzzing.share_of(kind, list(kinds), inputs) for kind in GENERATORS
    }
    assert all(counts["accepted"] and counts["refused"] and not counts["wrong"] for counts in kinds.values())


class Scripted(fuzzing.Worker):
    """Answers by the number of the input, without a process."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def start(self) -> Any:
        return None

    def try_input(self, kind: str, number: int) -> dict[str, str]:
        self.asked.append(number)
        return {"outcome": ("accepted", "refused", "exit code 1: a")[number % 3], "action": ""}


def test_a_run_of_the_fuzzer_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, worker = tmp_path / "fuzz.json", Scripted()
    for kind, inputs, commit, seed in (("data", 2, "a", 0), ("recipe", 2, "a", 0), ("recipe", 6, "a", 0),
                                       ("data", 3, "b", 0)):  # fmt: skip
        figures = fuzzing.Figures(path, commit, seed=seed)
        fuzzing.fuzz([kind], inputs, 1, worker, figures)
        figures.save()
    assert worker.asked == [1, 2, 1, 2, 3, 4, 5, 6, 1, 2, 3]
    written = json.loads(path.read_text())
    counts = {kind: [each[name] for name in ("commit", *fuzzing.OUTCOMES)] for kind, each in written["kinds"].items()}
    assert counts == {"recipe": ["a", 2, 2, 2], "data": ["b", 1, 1, 1]}
    assert [(each["kind"], each["number"]) for each in written["wrong"]] == [("recipe", 2), ("recipe", 5), ("data", 2)]
    fuzzing.fuzz(["data"], 1, 1, worker, figures := fuzzing.Figures(path, "b", seed=1))
    assert list(figures.kinds) == ["data"]  # of another seed
    assert '"number": 5' in capsys.readouterr().err


def test_the_fuzzers_checks_in_a_fork_are_those_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX refuses, dies of, or takes too long for."""
    model = light_copy(quantized_layer())
    sound, unsorted = model.SerializeToString(), type(model)()
    unsorted.CopyFrom(model)
    unsorted.graph.node.add().CopyFrom(unsorted.graph.node[0])
    del unsorted.graph.node[0]
    assert warm.run_fork(["5"], input=sound).stdout == b""
    assert b"topologically sorted" in warm.run_fork(["5"], input=unsorted.SerializeToString()).stdout
    monkeypatch.setattr(check_process, "structure_fault", lambda model: os.kill(os.getpid(), signal.SIGKILL))
    assert warm.run_fork(["5"], input=sound).returncode == -signal.SIGKILL
    monkeypatch.setattr(check_process, "structure_fault", lambda model: sum(iter(int, 1)))
    assert warm.run_fork(["0.1"], input=sound).returncode == check_process.TOO_LONG


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (SqatError("a", code="usage"), "refused"),
        (GateError("a", code="missed-gate"), "not one line"),
        (KeyError("k"), "KeyError"),
        (RecursionError(), "RecursionError"),
    ],
)
def test_the_fuzzer_tells_what_is_no_line(error: Exception, outcome: str) -> None:
    def read() -> None:
        raise error

    assert worker.try_action(read).startswith(outcome)


@pytest.mark.parametrize(
    ("code", "text", "errors", "outcome"),
    [
        (0, "a table\n", "", "accepted"),
        (2, "", "error: a\n", "refused"),
        (1, "", "internal error: KeyError\n", "exit code 1"),
        (2, "", "", "exit code 2 without"),
        (0, "\x1b]0;title\x07", "", "raw control"),
        (2, "", "error: a\u202eb\n", "raw control"),
        (2, "", "error: a\x9bb\n", "raw control"),
        (2, "", "Traceback (most recent call last):\nerror: a\n", "traceback"),
    ],
)
def test_the_fuzzer_judges_a_command(code: int, text: str, errors: str, outcome: str) -> None:
    assert worker.judge(code, text, errors).startswith(outcome)


def test_the_fuzzer_sees_files_outside(tmp_path: Path) -> None:
    watch = worker.Watch(tmp_path, is_active=True)
    for path in (tmp_path / "secret", tmp_path / "inside" / ".." / "new", tmp_path / "inside" / "own"):
        watch.see("open", (str(path), "w", os.O_WRONLY))
    watch.see("os.rename", (tmp_path / "inside" / "a", tmp_path / "b"))
    seen = [line.partition(" ")[0] for line in watch.seen]
    assert seen == ["opened", "wrote", "wrote", "os.rename"]


def test_the_fuzzer_ends_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that answers nothing is killed and told."""
    monkeypatch.setattr(fuzzing, "LIMIT", 0.05)
    silent = fuzzing.Worker(0, tmp_path)
    silent.command = [sys.executable, "-c", "print('ready', flush=True); import time; time.sleep(60)"]
    assert silent.try_input("recipe", 0)["outcome"].startswith("no answer")
    assert silent.process is None


def test_no_tag_of_a_recipe_makes_anything(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for tag in (
        f"!!python/object/apply:pathlib.Path.touch [{made}]",
        "!!python/name:os.system",
        "!!binary aGk=",
        "!x y",
    ):
        (tmp_path / "recipe.yaml").write_text(f"model: {tag}\n")
        with pytest.raises(SqatError, match=r"recipe\.yaml:1: the tag .* is not allowed"):
            load_recipe(tmp_path / "recipe.yaml")
    assert not made.exists()


SAID = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True, "use_safetensors": True}


@pytest.mark.parametrize("path", sorted((ROOT / "sqat").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_unpickles_or_trusts_remote_code(path: Path) -> None:
    """Whoever loads says so, and no library that runs what it reads is asked."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg in SAID:
            assert ast.unparse(node.value) == str(SAID[node.arg])
        if isinstance(node, ast.Import):
            assert not UNSAFE & {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in UNSAFE
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN


UNSAFE = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
FORBIDDEN = {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}


@pytest.mark.parametrize("kind", ["torch", "code"])
def test_a_model_that_needs_unpickling_or_its_own_code_is_refused(
    kind: str, tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    source = tmp_path / "model"
    make_model().save_pretrained(source)
    if kind == "torch":
        (source / "model.safetensors").unlink()
        torch.save(make_model().state_dict(), source / "pytorch_model.bin")
    else:
        (source / "mine.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\n")
        config = json.loads((source / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"},
        }
        (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SqatError):
        load_pretrained("texts", ModelConfig(source=str(source)), tmp_path, {"num_labels": 2}, 0)
    assert not (tmp_path / "made").exists()
