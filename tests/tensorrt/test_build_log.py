"""Build logs and layer information in every known form, whole and damaged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqat.errors import SqatError
from sqat.tensorrt.build_log import (
    BuildLog,
    Choice,
    EngineConstant,
    EngineLayer,
    merge,
    parse_log,
    read_layers,
    read_log,
)
from tests.errors import raises_code

LOGS = Path(__file__).parent / "logs"


def test_the_form_of_tensorrt_8() -> None:
    log = read_log(LOGS / "trtexec-8.log")
    assert log.choice == Choice(3, 1, ("Conv_2 + Relu_4", "Conv_7", "MatMul_11"), ("Conv_2 + Relu_4",), True)
    assert (log.weight_bytes, log.layers, log.chosen_later) == (None, (), False)


def test_an_empty_list_is_no_layer() -> None:
    choice = read_log(LOGS / "python-8.log").choice
    assert choice == Choice(2, 0, ("Conv_2 + Relu_4", "Conv_7"), (), True)
    assert choice.lists_all_names


def test_the_form_of_tensorrt_10_takes_the_largest_pair() -> None:
    log = read_log(LOGS / "trtexec-10.log")
    assert log.choice is not None
    assert (log.choice.eligible, log.choice.chosen, log.choice.version_8) == (8, 4, False)
    assert (len(log.choice.eligible_names), len(log.choice.chosen_names)) == (8, 4)
    assert log.choice.chosen_names[1] == "/bert/encoder/layer.0/intermediate/dense/MatMul_myl0_5"
    assert log.weight_bytes == 111368


def test_counts_without_names() -> None:
    choice = read_log(LOGS / "trtexec-10-counts.log").choice
    assert choice == Choice(8, 0, (), ())
    assert not choice.lists_all_names


def test_layer_information_of_tensorrt_8() -> None:
    scale, sparse, dense = read_layers(LOGS / "inspector-8.json").layers
    assert (scale.kind, scale.tactic, scale.eligible, scale.sparse) == ("Scale", "", None, False)
    assert (sparse.name, sparse.nodes) == ("Conv_2 + Relu_4", ("Conv_2", "Relu_4"))
    assert sparse.constants == (EngineConstant("int8", 32 * 64),)
    assert (sparse.eligible, sparse.sparse) == (True, True)
    assert (dense.eligible, dense.sparse) == (True, False), "2:4 weights do not make a sparse kernel"


def test_layer_information_of_tensorrt_11() -> None:
    layers = read_layers(LOGS / "inspector-11.json").layers
    assert [layer.sparse for layer in layers if layer.kind == "gemm"] == [True, False, True, False] + [True] + [
        False
    ] * 3
    assert len(layers[0].nodes) == 3
    assert layers[0].constants == (EngineConstant("int8", 32 * 96), EngineConstant("fp32", 1))


def test_the_same_layers_in_a_verbose_log() -> None:
    entries = json.loads((LOGS / "inspector-11.json").read_text(encoding="utf-8"))["Layers"]
    text = "[V] [TRT] Layers:\n" + "\n".join(as_line(entry) for entry in entries)
    assert parse_log(text).layers == read_layers(LOGS / "inspector-11.json").layers


def as_line(entry: dict[str, object]) -> str:
    """An entry of the JSON as a verbose log writes it."""
    parts = []
    for key, value in entry.items():
        if isinstance(value, list):
            tensors = [", ".join(f"{k}: {str(v).replace(' ', '')}" for k, v in tensor.items()) for tensor in value]
            value = "[" + ",".join(f" {{ {tensor} }}" for tensor in tensors) + "]"
        parts.append(f"{key}: {value}")
    return ", ".join(parts)


def test_a_log_and_a_layer_file_of_one_build() -> None:
    log, layers = read_log(LOGS / "trtexec-10.log"), read_layers(LOGS / "inspector-11.json")
    assert merge(log, layers) == BuildLog(log.choice, layers.layers, 111368)
    assert merge(log, None) is log
    assert merge(None, layers) is layers


@pytest.mark.parametrize(
    ("tactic", "sparse"),
    [
        ("sm80_xmma_sparse_gemm_f16f16_f16f32_f32_nt_n_tilesize128x128x64_stage3_warpsize2x2x1_sptensor16x8x32", True),
        ("sm86_xmma_fprop_conv1x1_i8i8_f32_sptensor16x8x64_t1r1s1", True),
        ("cutlass_80_tensorop_i16864spgemm_s8_256x128_128x3", True),
        ("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64_stage4_warpsize2x2x1_tensor16x8x32", False),
        ("__myl_ResTraSplMul_0x2f", False),
        ("", False),
    ],
)
def test_names_of_sparse_kernels(tactic: str, sparse: bool) -> None:
    assert EngineLayer("a", "gemm", tactic, (), ()).sparse is sparse


SPARSITY_10 = "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b, c\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("[I] Engine built in 3 sec.\n", "says nothing of sparse kernels"),
        (SPARSITY_10, "is cut short"),
        (SPARSITY_10 + "(Sparsity) Chose 4 layer(s) using sparse tactics: a", "is damaged: 4 layers chosen of 3"),
    ],
)
def test_logs_without_an_answer_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "build.log"
    path.write_text(text)
    with pytest.raises(SqatError, match=problem) as error:
        read_log(path)
    assert (error.value.code, error.value.place) == ("unreadable-file", str(path))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[: len(text) // 2], "is not JSON, or cut short"),
        (lambda text: "[I] Engine built\n", "is not JSON, or cut short"),
        (lambda text: '{"Bindings": ["x"]}', "holds no list of layers"),
        (lambda text: '{"Layers": []}', "holds no list of layers"),
        (lambda text: '"Layers"', "holds no list of layers"),
        (lambda text: (LOGS / "inspector-names.json").read_text(), "names the layers and no more"),
    ],
)
def test_layer_files_without_an_answer_are_refused(tmp_path: Path, change: Callable[[str], str], problem: str) -> None:
    path = tmp_path / "layers.json"
    path.write_text(change((LOGS / "inspector-11.json").read_text()))
    with pytest.raises(SqatError, match=problem) as error:
        read_layers(path)
    assert (error.value.code, error.value.place) == ("unreadable-file", str(path))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for read in (read_log, read_layers):
        with pytest.raises(SqatError) as error:
            read(tmp_path / "absent")
        assert error.value.code == "missing-file"


def test_a_log_that_powershell_redirected(tmp_path: Path) -> None:
    path = tmp_path / "build.log"
    path.write_text((LOGS / "trtexec-8.log").read_text(), encoding="utf-16")
    assert read_log(path) == read_log(LOGS / "trtexec-8.log")


NAMES = st.lists(  # "..." is how a shortened list ends
    st.text("abcMatul./_+019", min_size=1, max_size=12)
    .filter(lambda text: text != "...")
    .map(lambda text: f"{text}_1 + Relu_2" if "u" in text else text),
    max_size=6,
    unique=True,
)
PREFIXES = st.sampled_from(
    ["", "[I] [TRT] ", "[07/19/2022-11:58:20] [I] [TRT] ", "[TensorRT] INFO: ", "2024 | build | "]
)
NOISE = st.sampled_from(
    [
        "",
        "[V] [TRT] Chose Runner Type: CaskGemm Tactic: 0x1",
        "Sparsity: Enabled",
        "[W] [TRT] Found 3 layer(s)",
        "é\u2028x",
    ]
)


def form_8(eligible: list[str], chosen: list[str]) -> list[str]:
    return [
        f"(Sparsity) Layers eligible for sparse math: {', '.join(eligible)}",
        f"(Sparsity) TRT inference plan picked sparse implementation for layers: {', '.join(chosen)}",
    ]


def form_10(eligible: list[str], chosen: list[str]) -> list[str]:
    def end(names: list[str]) -> str:
        return f": {', '.join(names)}" if names else ""

    return [
        f"(Sparsity) Found {len(eligible)} layer(s) eligible to use sparse tactics{end(eligible)}",
        f"(Sparsity) Chose {len(chosen)} layer(s) using sparse tactics{end(chosen)}",
    ]


@given(
    st.lists(st.tuples(NAMES, st.integers(0, 6)), min_size=1, max_size=3),
    PREFIXES,
    st.lists(NOISE, min_size=2, max_size=2),
    st.sampled_from([form_8, form_10]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_every_rendered_log_is_read_back(pairs, prefix: str, noise: list[str], form, end: str) -> None:
    lines = []
    for names, kept in pairs:
        before, after = form(names, names[:kept])
        lines += [noise[0], f"{prefix}{before}", noise[1], f"{prefix}{after}"]
    choice = parse_log(end.join(lines)).choice
    longest, kept = max(
        ((names, min(kept, len(names))) for names, kept in pairs), key=lambda pair: (len(pair[0]), pair[1])
    )
    assert choice is not None
    assert (choice.eligible, choice.chosen) == (len(longest), kept)
    assert choice.lists_all_names
    assert choice.version_8 == (form is form_8)
    assert (choice.eligible_names, choice.chosen_names) in [
        (tuple(names), tuple(names[:count]))
        for names, count in pairs
        if (len(names), min(count, len(names))) == (len(longest), kept)
    ]


@given(st.text(alphabet="(Sparsity) Layer:Name,TacticConst[]{}\n\x1e0123456789", max_size=400))
def test_no_text_breaks_the_reader(text: str) -> None:
    for half in (text, f"Name: {text}, LayerType: gemm, Inputs: [{text}], TacticName: {text}"):
        assert parse_log(half).choice is None


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["Name", "Inputs", "Constants", "Dimensions", "Datatype", "Weights", "Count", "Metadata"]
                ),
                inner,
            )
        ),
    )
)
def test_no_json_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.getbasetemp() / "layers.json"
    entry = {"LayerType": "gemm", **(content if isinstance(content, dict) else {"Inputs": content})}
    path.write_text(json.dumps({"Layers": [entry]}))
    with contextlib.suppress(SqatError):
        assert len(read_layers(path).layers) == 1


@pytest.mark.parametrize(
    "piece",
    [
        "Name: ",
        "Name: a, LayerType: ",
        "Name: a, LayerType: b, TacticName: ",
        "Constants: [",
        "Constants: [{",
        " ",
        "}",
        "Name: a, LayerType: b, Constants: [{",
        "Dimensions: [1], ",
        "Dimensions: [1",
        "[ONNX Layer: ",
        "_myl1",
        "1",
        ",",
        "Metadata: ",
        "Weights: {",
        "tensorrt_rtx 1.",
        "(Sparsity) Found ",
        "&&&& RUNNING TensorRT",
        "\r",
        "\x1e",
        "a, ",
    ],
)
@pytest.mark.parametrize(
    "head",
    ["", "Name: a, LayerType: b, ", "Name: a, LayerType: b, Constants: [{ ", "Name: a, LayerType: b, Metadata: "],
)
def test_a_line_of_a_megabyte_is_read_at_once(piece: str, head: str) -> None:
    """In quadratic time, each would take many minutes."""
    parse_log(head + piece * (1_000_000 // len(piece)))


LAYER_LINE = "Name: %s, LayerType: gemm, TacticName: sparse, StreamId: 0"


def whole_build(name: str, begin: str = "", end: str = "") -> str:
    lines = [
        *form_10([f"{name}a", f"{name}b"], [f"{name}a"]),
        f"Name: {name}a, LayerType: gemm, TacticName: sparse, StreamId: 0",
    ]
    return "\n".join([begin, *lines, end])


BEGINS = [
    "&&&& RUNNING TensorRT.trtexec [TensorRT v101300] # trtexec",
    "[I] [TRT] tensorrt 10.13.0, sparse weights allowed",
]
ENDS = [
    "[I] Engine built in 3.1 sec.",
    "[I] [TRT] Engine generation completed in 2.9 s.",
    "&&&& PASSED TensorRT.trtexec",
]


@pytest.mark.parametrize(("begin", "end"), [*((begin, "") for begin in BEGINS), *(("", end) for end in ENDS)])
def test_of_several_builds_the_last_counts(begin: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "build.log"
    path.write_text("\n".join(whole_build(name, begin, end) for name in ("x", "y", "z")))
    log = read_log(path)
    assert (log.builds, log.choice) == (3, Choice(2, 1, ("za", "zb"), ("za",)))
    assert [layer.name for layer in log.layers] == ["za"]
    path.write_text(whole_build("x", begin, end) + "\n" + (begin or whole_build("y").splitlines()[1]))
    with pytest.raises(SqatError, match="2 builds" if begin else "cut short"):
        read_log(path)


def test_parts_of_one_build_are_one_build() -> None:
    parts = "\n".join([*form_10(["a"], []), *form_10(["a", "b", "c"], ["b"]), *form_10(["c"], ["c"]), *ENDS])
    assert parse_log("\n".join([*BEGINS[:1], parts, LAYER_LINE % "b"])).builds == 1
    assert parse_log(parts).choice == Choice(3, 1, ("a", "b", "c"), ("b",))


LAYER = {"Name": "a", "LayerType": "gemm"}


@pytest.mark.parametrize(
    "entry",
    [
        {"Constants": 3},
        {"Constants": [{"Dimensions": [[1]]}]},
        {"Constants": [{"Dimensions": [None]}]},
        {"Constants": [{"Dimensions": [float("inf")]}]},
        {"Constants": [{"Dimensions": ["1-2"]}]},
        {"Constants": [{"Dimensions": [10**20]}]},
        {"Weights": {"Count": []}},
        {"Weights": {"Count": "x"}},
        {"Weights": {"Count": float("inf")}},
        {"Weights": {"Count": float("nan")}},
        {"Constants": None},
    ],
)
def test_a_layer_in_an_unknown_form_is_one_line(entry: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"Layers": [LAYER | entry]}))
    with pytest.raises(SqatError, match="describes a layer in an unknown form") as error:
        read_layers(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"Metadata": 3},
        {"Metadata": None},
        {"Name": {"a": [1]}},
        {"TacticName": []},
        {"Weights": 3},
        {"HasSparseWeights": "x"},
        {"Constants": ["a"]},
        {"Constants": [{}]},
        {"Constants": [{"Dimensions": []}]},
    ],
)
def test_odd_values_of_a_layer_say_nothing(entry: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(json.dumps([LAYER | entry]))
    assert all(constant.count == 0 for constant in read_layers(path).layers[0].constants)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"Layers": ' * 300, f'{{"Layers": [{"9" * 5000}]}}', '["\\ud800"]', "[NaN, {}]", "[[]]", "[{}]"],
)
def test_odd_json_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(text)
    with raises_code("unreadable-file"):
        read_layers(path)
