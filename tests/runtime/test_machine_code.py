"""The library's machine code: no loop of a kernel takes vectors apart into single values.

A compiler that has no instruction for generic vector code falls back to one value at a time: the same bits, at half the
speed. Reading the code needs no clock, and no processor with the instruction set.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest

from sqat import runtime
from tests.runtime.nodes import needs_library

pytestmark = [
    needs_library,
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no binutils"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 code"),
]

WIDEST = {  # source of an instruction set's kernels -> its registers
    "vector_math_avx512.cpp": "zmm",
    "vector_math_avx2.cpp": "ymm",
    "vector_math_scalar.cpp": "xmm",
}
PRODUCTS = ("gemm_avx2.cpp", "gemm_vnni.cpp")
KERNELS = (
    *("context", "dequantize_as", "embed_row", "finish_row", "mean", "softmax"),
    *("count_bins", "fake_quantize", "fake_quantize_rows", "largest_of", "mask", "rank_fours", "select"),
)
HIGHEST_SHARE = 1 / 16  # of instructions on one value, in the loops of a function
SCATTERS = {"count_bins": 1 / 4}  # every value is an address
SINGLE = re.compile(
    r"v?p(extr|insr)[bwdq]|v?(extract|insert)ps"  # lanes
    r"|v?(add|sub|mul|div|sqrt|max|min|comi|ucomi|cvt\w*2)s[sd]|v?cvts[sid]\w+"  # scalar floats
    r"|i?div[bwlq]?|mov[sz]b[wlq]?|movb"  # divisions, bytes
)
BETWEEN = re.compile(r"v?mov[dq]")  # single values, where a general register is on one side
GENERAL = re.compile(r"%[er][a-ds0-9]\w*")
BYTE = re.compile(r"%([abcd]l|[sd]il|r\d+b),")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def is_single(self) -> bool:
        """Whether it computes or moves one value of a vector or one byte."""
        outside = re.sub(r"\(.*?\)", "", self.operands)  # registers of an address are none of its operands
        if BETWEEN.fullmatch(self.name):
            return "%xmm" in outside and GENERAL.search(outside) is not None
        if self.name == "mov":
            return BYTE.match(self.operands) is not None
        return SINGLE.fullmatch(self.name) is not None

    @property
    def is_division(self) -> bool:
        return re.fullmatch(r"i?div[bwlq]?", self.name) is not None


class Function(NamedTuple):
    source: str
    name: str
    code: list[Instruction]

    def loops(self) -> list[range]:
        """Return the places from the target of each jump back to the jump."""
        places = {each.address: place for place, each in enumerate(self.code)}
        found = []
        for end, each in enumerate(self.code):
            target = re.match("[0-9a-f]+", each.operands) if each.name.startswith("j") else None
            if target and (start := places.get(int(target[0], 16), len(self.code))) <= end:
                found.append(range(start, end + 1))
        return found

    def share(self) -> float:
        """Return the share of instructions on single values in the loops, or in all code where there is no loop."""
        inside = sorted({place for loop in self.loops() for place in loop}) or range(len(self.code))
        return sum(self.code[place].is_single for place in inside) / len(inside)

    def divides(self) -> bool:
        """Whether a loop that holds no other loop divides integers."""
        loops = self.loops()
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[-1] <= a[-1] for b in loops)]
        return any(self.code[place].is_division for loop in inner for place in loop)


def read_code(text: str) -> dict[int, tuple[str, list[Instruction]]]:
    """Return name and instructions of each function of a disassembly, by address."""
    functions: dict[int, tuple[str, list[Instruction]]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if head := re.fullmatch(r"([0-9a-f]+) <(.*)>:", line):
            code = []
            functions[int(head[1], 16)] = head[2].replace("sqat::(anonymous namespace)::", ""), code
        elif part := re.fullmatch(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            code.append(Instruction(int(part[1], 16), part[2], part[3]))
    return functions


def objdump(*options: str) -> str:
    return subprocess.run(["objdump", *options, runtime.library()], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    """All functions that belong to one source."""
    code, found, source = read_code(objdump("-d", "-C", "--no-show-raw-insn")), [], ""
    for line in objdump("-t").splitlines():
        address, _, rest = line.partition(" ")
        if " df *ABS*" in line:
            source = line.split()[-1]
        elif re.match(r"l\s+F \.text\s", rest) and int(address, 16) in code:
            found.append(Function(source, *code[int(address, 16)]))
    return found


def name_of(function: Function) -> str:
    """Return a function's name without its type and parameters."""
    return re.split(r"[<(]", function.name.removeprefix("void "))[0]


def highest_share(function: Function) -> float:
    return SCATTERS.get(name_of(function), HIGHEST_SHARE)


@pytest.mark.parametrize("source", [*WIDEST, *PRODUCTS])
def test_loops_keep_vectors_whole(source: str, functions: list[Function]) -> None:
    of_source = [each for each in functions if each.source == source]
    assert len(of_source) > 4
    assert {each.name: share for each in of_source if (share := each.share()) > highest_share(each)} == {}


@pytest.mark.parametrize("source", WIDEST)
def test_kernels_use_the_widest_registers(source: str, functions: list[Function]) -> None:
    registers: dict[str, str] = {}
    for each in functions:
        if each.source == source:
            registers[name_of(each)] = registers.get(name_of(each), "") + "".join(part.operands for part in each.code)
    assert set(KERNELS) <= set(registers)
    assert [name for name in KERNELS if WIDEST[source] not in registers[name]] == []


def test_inner_loops_divide_no_integers(functions: list[Function]) -> None:
    known = [each for each in functions if each.source in (*WIDEST, *PRODUCTS, "attention.cpp")]
    assert any("Attention::compute" in each.name for each in known)
    assert [each.name for each in known if each.divides()] == []


# What gcc 12 makes of a conversion of sixteen integers to bytes, and of `offsets[i / size] -= values[i]`.
APART = """
0000000000001000 <sqat::(anonymous namespace)::store_bytes(int const*, unsigned char*, unsigned long)>:
    1000:\tvmovdqu (%rdi),%xmm0
    1004:\tvmovd  %xmm0,%eax
    1008:\tvpextrd $0x1,%xmm0,%ecx
    100e:\tvmovd  %eax,%xmm1
    1012:\tvpinsrb $0x1,%ecx,%xmm1,%xmm1
    1018:\tvmovd  %xmm1,(%rsi)
    101c:\tadd    $0x10,%rdi
    1020:\tadd    $0x4,%rsi
    1024:\tcmp    %rdx,%rdi
    1027:\tjne    1000 <sqat::(anonymous namespace)::store_bytes(int const*, unsigned char*, unsigned long)>
    1029:\tret
0000000000001030 <sqat::(anonymous namespace)::set_offsets(signed char const*, unsigned long, int*)>:
    1030:\tmov    %rcx,%rax
    1033:\txor    %edx,%edx
    1035:\tdivq   0x8(%rdi)
    1039:\tmovsbl (%rsi,%rcx,1),%edx
    103d:\tsub    %edx,(%r8,%rax,4)
    1041:\tinc    %rcx
    1044:\tcmp    %r9,%rcx
    1047:\tjne    1030 <sqat::(anonymous namespace)::set_offsets(signed char const*, unsigned long, int*)>
    1049:\tvmovdqu (%rsi),%xmm1
    104d:\tvmulss %xmm1,%xmm1,%xmm2
    1051:\tret
"""


def test_code_that_takes_vectors_apart_is_seen() -> None:
    stores, offsets = (Function("", *each) for each in read_code(APART).values())
    assert stores.loops() == [range(10)]
    assert [each.is_single for each in stores.code] == [False, *[True] * 4, *[False] * 6]
    assert stores.share() == 4 / 10
    assert not stores.divides()
    assert offsets.loops() == [range(8)]
    assert offsets.share() == 2 / 8  # the division and a byte; a float behind the loop does not count
    assert offsets.divides()
