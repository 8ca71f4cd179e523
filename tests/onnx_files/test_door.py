"""The door for ONNX files: what ONNX refuses is one line, and nothing outside the model's folder is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sqat.errors import SqatError
from sqat.onnx_files import check_process, read
from sqat.onnx_files.check_process import check_apart
from sqat.onnx_files.checks import light_copy
from sqat.onnx_files.read import read_graph, read_onnx
from tests.errors import raises_code

PRODUCT = """agraph (float[n, 4] x) => (float[n, 4] y) { y = MatMul(x, w) }"""
WEIGHT = np.ones((4, 4), np.float32)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check in a process apart, as users do."""
    monkeypatch.setattr(read, "check_apart", check_apart)


def parsed(text: str, opset: int = 20, imports: str = "", **constants: np.ndarray) -> ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}{imports}]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def product(edit: Callable[[TensorProto], object] = lambda tensor: None) -> ModelProto:
    """A product with an edited weight."""
    model = parsed(PRODUCT, w=WEIGHT)
    edit(model.graph.initializer[0])
    return model


def set_dims(tensor: TensorProto, *dims: int) -> None:
    tensor.dims[:] = dims


def cut_data(tensor: TensorProto, size: int) -> None:
    tensor.raw_data = (tensor.raw_data * 2)[:size]


def store_numbers(tensor: TensorProto, count: int) -> None:
    tensor.ClearField("raw_data")
    tensor.float_data[:] = [1.0] * count


def without_output(model: ModelProto) -> ModelProto:
    del model.graph.node[0].output[:]
    return model


def behind(operator: str, **constants: np.ndarray) -> ModelProto:
    """A product whose weight something computes from ``w``."""
    text = f"agraph (float[n, 4] x) => (float[n, 4] y) {{ t = {operator} y = MatMul(x, t) }}"
    return parsed(text, w=WEIGHT, **constants)


REFUSED: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "cycle of one": (lambda: behind("Identity(t)"), "topologically sorted"),
    "cycle of two": (lambda: behind("Identity(u) u = Identity(t)"), "topologically sorted"),
    "unsorted": (lambda: behind("Identity(u) u = Identity(w)"), "topologically sorted"),
    "no inputs": (lambda: behind("DequantizeLinear()"), "input size 0"),
    "empty inputs": (lambda: behind('DequantizeLinear("", "")'), "input 0"),
    "perm beyond": (lambda: behind("Transpose<perm = [5, 7]>(w)"), "perm"),
    "perm negative": (lambda: behind("Transpose<perm = [-1, -2]>(w)"), "perm"),
    "perm twice": (lambda: behind("Transpose<perm = [0, 0]>(w)"), "perm"),
    "reshape": (lambda: behind("Reshape(w, s)", s=np.array([3, 5])), "Incompatible"),
    "constant without value": (lambda: behind("Constant()"), "one of the attributes"),
    "constant without outputs": (lambda: without_output(behind("Constant<value_float = 1.0>()")), "zero output"),
    "two of a name": (lambda: behind("Identity(w) t = Identity(w)"), "used as output names multiple times"),
    "raw data short": (lambda: product(lambda w: cut_data(w, 10)), "raw_data"),
    "raw data long": (lambda: product(lambda w: cut_data(w, 65)), "65 bytes"),
    "no data": (lambda: product(lambda w: cut_data(w, 0)), "value field"),
    "few numbers": (lambda: product(lambda w: store_numbers(w, 3)), "tensor"),
    "many numbers": (lambda: product(lambda w: store_numbers(w, 17)), "tensor"),
    "negative size": (lambda: product(lambda w: set_dims(w, -4, 4)), "egative"),
    "huge size": (lambda: product(lambda w: set_dims(w, 4, 1 << 40)), "differ in dimension"),
    "huger size": (lambda: product(lambda w: set_dims(w, 1 << 40, 1 << 40)), "w"),
    "no type": (lambda: product(lambda w: setattr(w, "data_type", 0)), "data_type"),
    "unknown type": (lambda: product(lambda w: setattr(w, "data_type", 99)), "99"),
    "opset": (lambda: parsed(PRODUCT, opset=1 << 40, w=WEIGHT), "out of supported range"),
    "function that calls itself": (
        lambda: onnx.parser.parse_model(
            f'<ir_version: 9, opset_import: ["" : 20, "f" : 1]> {PRODUCT.replace("MatMul(x, w)", "f.g(x)")}'
            ' <domain: "f", opset_import: ["" : 20, "f" : 1]> g (a) => (b) { b = f.g(a) }'
        ),
        "Cycle",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_refuses_is_one_line(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    for door in (read_onnx, read_graph):
        with pytest.raises(SqatError, match=words) as error:
            door(path)
        assert (error.value.code, error.value.exit_code, error.value.place) == ("invalid-onnx", 2, str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("imports", ["", ', "my": 1'])
@pytest.mark.parametrize("domain", ["my", "com.microsoft", "trt.plugins", "sqat"])
def test_custom_operators_are_read(domain: str, imports: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    text = PRODUCT.replace("MatMul(x, w)", f"{domain}.Fancy(x, w)")
    path.write_bytes(parsed(text, imports=imports, w=WEIGHT).SerializeToString())
    assert read_onnx(path).graph.node[0].domain == domain


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16", "int8", "uint4", "int4", "float8e4m3fn", "bool"])
@pytest.mark.parametrize("raw", [True, False])
def test_values_of_every_type_are_read(dtype: str, raw: bool, tmp_path: Path) -> None:
    """An odd number of values: two of 4 bits share a byte."""
    number = getattr(TensorProto, dtype.upper())
    values = np.ones(15, helper.tensor_dtype_to_np_dtype(number)).reshape(3, 5)
    tensor = numpy_helper.from_array(values, "c")
    if not raw:
        tensor = helper.make_tensor("c", number, (3, 5), values.astype(np.float32).ravel().tolist())
    model = product()
    model.graph.initializer.append(tensor)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    np.testing.assert_array_equal(numpy_helper.to_array(read_onnx(path).graph.initializer[1]), values)


@pytest.mark.parametrize("place", ["name", "op_type", "input", "domain"])
def test_a_name_that_is_no_text_is_refused(place: str, tmp_path: Path) -> None:
    model = product()
    node = model.graph.node[0]
    node.input[0] = "marked" if place == "input" else "x"
    if place != "input":
        setattr(node, place, "marked")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString().replace(b"marked", b"mar\xff\xfed"))
    with raises_code("invalid-onnx", match="not UTF-8"):
        read_onnx(path)


def outside(folder: Path, **fields: str) -> Path:
    """A model whose weight lies in a file beside it."""
    model = parsed(PRODUCT.replace("4", "80"), w=np.ones((80, 80), np.float32))
    tensor = model.graph.initializer[0]
    (folder / "data").write_bytes(b"\0" * 8 + tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "data", "offset": "8", "length": "25600"} | fields).items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"location": "../data"}, "not a file beside"),
        ({"location": "sub/../../data"}, "not a file beside"),
        ({"location": "/etc/hostname"}, "not a file beside"),
        ({"location": "C:\\data"}, "not a file beside"),
        ({"location": "..\\data"}, "not a file beside"),
        ({"location": ""}, "not a file beside"),
        ({"location": "gone"}, "no such file"),
        ({"location": "link"}, "link"),
        ({"location": "linked/data"}, "link"),
        ({"location": "pipe"}, "pipe"),
        ({"location": "."}, "folder"),
        ({"location": "a\0b"}, "data"),
        ({"offset": "9"}, "ends at byte 25608"),
        ({"offset": "9" * 18}, "ends at byte"),
        ({"offset": "9" * 400}, "names 25600 at -1"),
        ({"offset": "-8"}, "names 25600 at -1"),
        ({"length": "25599"}, "needs 25600 bytes"),
        ({"length": "x"}, "needs 25600 bytes"),
    ],
)  # fmt: skip
def test_external_data_lies_beside_the_file(fields: dict[str, str], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    path = outside(folder, **fields)
    (tmp_path / "data").write_bytes((folder / "data").read_bytes())
    (folder / "link").symlink_to(tmp_path / "data")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    for door in (read_onnx, read_graph):
        with raises_code("unreadable-file", match=words):
            door(path)


def test_external_data_is_read_where_it_is_needed(tmp_path: Path) -> None:
    path = outside(tmp_path)
    assert read_graph(path).graph.initializer[0].raw_data == b""
    np.testing.assert_array_equal(numpy_helper.to_array(read_onnx(path).graph.initializer[0]), 1)


def doubled(times: int) -> ModelProto:
    """Inference propagates the values of a shape, and each Concat doubles them."""
    nodes = "".join(f"s{i + 1} = Concat<axis = 0>(s{i}, s{i})" for i in range(times))
    return parsed(f"agraph (float[n, 4] x) => (float y) {{ s0 = Shape(x) {nodes} y = ConstantOfShape(s{times}) }}")


def called(depth: int) -> ModelProto:
    """Each function calls another twice."""
    functions = "".join(
        f'<domain: "f", opset_import: ["" : 20, "f" : 1]> g{i} (a) => (b)'
        f" {{ {f'm = f.g{i - 1}(a) b = f.g{i - 1}(m)' if i else 'b = Identity(a)'} }}\n"
        for i in range(depth)
    )
    header = '<ir_version: 9, opset_import: ["" : 20, "f" : 1]>'
    return onnx.parser.parse_model(
        f"{header} agraph (float[n, 4] x) => (float[n, 4] y) {{ y = f.g{depth - 1}(x) }} {functions}"
    )


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("make", [lambda: doubled(60), lambda: called(60)], ids=["values", "functions"])
def test_inference_without_end_is_refused(
    make: Callable[[], ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_process, "SECONDS", 0.2)
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    with raises_code("invalid-onnx", match="needs more than"):
        read_graph(path)


def test_the_process_says_what_it_refuses_and_imports_nothing_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx.py").write_text("raise SystemExit('taken')")
    monkeypatch.chdir(tmp_path)
    assert check_apart(light_copy(product())) == ""
    assert "topologically sorted" in check_apart(light_copy(behind("Identity(t)")))


def test_a_process_that_crashes_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_process.sys, "executable", "/bin/false")
    assert "ends with code 1" in check_apart(light_copy(product()))
