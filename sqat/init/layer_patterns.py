"""Names and regular expressions of layers, as SparseML and llm-compressor write them, to globs.

A glob selects exactly what the expression selects of a model's layers; what no glob can say is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from sqat.errors import SqatError

MAX_GLOBS = 64
EVERYTHING = ("__ALL__", "__ALL_PRUNABLE__", "__ALL_QUANTIZABLE__", "Linear")
WEIGHT = ".weight"
# Marks in a glob that is being made: the end of the name, its beginning, a run of digits.
END, START, DIGITS = "$", "^", "#"
TOKEN = re.compile(r"\[[^\]]*\]|.", re.DOTALL)
CLASS = re.compile(r"\[(\^?)((?:\\\.|\\d|[\w.-])+)\]")
REPEAT = re.compile(r"([*+?]|\{\d\})[?+]?")
# Linears of a block in common encoders: a run of digits becomes a star only where it reads none of these as another.
INNER_LAYERS = (
    *("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense", "attention.out_lin"),
    *("self_attn.q_proj", "self_attn.out_proj", "mlp.down_proj", "mlp.experts.0.w1"),
    *("attention.dense", "mlp.dense_h_to_4h", "layer.0.SelfAttention.q"),
)


class NoGlobError(ValueError):
    """No glob says what the regular expression says."""


def to_globs(name: str, *, of_blocks: bool = False, by_prefix: bool = False) -> list[str]:
    """Translate the name of a layer or of its weight, or a regular expression ``re:...``, into globs; ``*`` for all.

    Args:
        of_blocks: a name may be that of a block, and then means the layers in it.
        by_prefix: a name means every layer whose name begins so.

    Raises:
        SqatError: no glob says the same.
    """
    if name in EVERYTHING:
        return ["*"]
    if not name.startswith("re:"):
        layer = name.removesuffix(WEIGHT)
        if not layer or set(layer) & set("*?[]"):
            raise SqatError(f"{name!r} is no name of a layer", "write re: before an expression", code="invalid-recipe")
        return [layer + ("*" if by_prefix else ".*" if of_blocks and layer == name and layer[-1].isdigit() else "")]
    try:
        globs = [glob for draft in Expression(name[3:]).expand() for glob in finish(draft, of_blocks)]
    except NoGlobError as error:
        hint = "write the names of the layers, or a simpler expression"
        raise SqatError(f"no glob selects what {name!r} selects: {error}", hint, code="invalid-recipe") from None
    globs = list(dict.fromkeys(globs))
    return ["*"] if "*" in globs else globs


class Expression:
    """A regular expression, read from left to right into drafts of globs."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def expand(self) -> list[str]:
        """Return the drafts of the whole expression."""
        drafts = self.alternatives()
        if not self.text:
            raise NoGlobError("it is empty")
        if self.at < len(self.text):
            raise NoGlobError("a ) without its (")
        return drafts

    def alternatives(self) -> list[str]:
        """Read up to a closing bracket."""
        drafts = self.sequence()
        while self.text.startswith("|", self.at):
            self.at += 1
            drafts += self.sequence()
        return drafts

    def sequence(self) -> list[str]:
        """Read up to the next alternative."""
        drafts = [""]
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts = self.repeated(self.atom())
            if len(drafts) * len(parts) > MAX_GLOBS:
                raise NoGlobError(f"it has more than {MAX_GLOBS} alternatives")
            drafts = [draft + part for draft in drafts for part in parts]
        return drafts

    def atom(self) -> list[str]:
        """Read a character, a class or a group."""
        letter, rest = self.text[self.at], self.text[self.at :]
        if letter == "(":
            if rest[1:2] == "?" and rest[2:3] != ":":
                raise NoGlobError(f"it holds {rest[:3]}")
            self.at += 3 if rest[1:2] == "?" else 1
            parts = self.alternatives()
            if not self.text.startswith(")", self.at):
                raise NoGlobError("a ( is never closed")
            self.at += 1
            return parts
        if letter == "[":
            return [self.character_class(rest)]
        if letter == "\\":
            self.at += 2
            escaped = rest[1:2]
            if escaped in ("d", "w", "Z"):
                return [{"d": "[0-9]", "w": "[0-9A-Za-z_]", "Z": END}[escaped]]
            if escaped in tuple("._-/"):
                return [escaped]
            raise NoGlobError(f"it holds \\{escaped}")
        self.at += 1
        if letter in "*+?{]}#":
            raise NoGlobError(f"it holds {letter} where no character stands before it")
        return ["?" if letter == "." else letter]

    def character_class(self, rest: str) -> str:
        """Read ``[...]``."""
        match = CLASS.match(rest)
        if match is None:
            raise NoGlobError(f"it holds {rest[:10]}")
        self.at += match.end()
        inner = match[2].replace("\\.", ".").replace("\\d", "0-9")
        return inner if len(inner) == 1 and not match[1] else f"[{'!' if match[1] else ''}{inner}]"

    def repeated(self, parts: list[str]) -> list[str]:
        """Read what stands behind an atom: ``*``, ``+``, ``?`` or ``{3}``."""
        match = REPEAT.match(self.text, self.at)
        if match is None:
            return parts
        self.at += match.end() - match.start()
        times = match[1]
        if times == "?":
            return [*parts, ""]
        if times[0] == "{" and len(parts) == 1:
            return [parts[0] * int(times[1])]
        if parts == ["?"]:
            return ["*" if times == "*" else "?*"]
        if parts == ["[0-9]"]:
            return [DIGITS, ""] if times == "*" else [DIGITS]
        if self.at == len(self.text) and not self.text.endswith(("$", ")")) and len(parts) == 1:
            return ["" if times == "*" else parts[0]]  # a name goes on as it likes behind the expression
        raise NoGlobError(f"it repeats {parts[0] if parts else ''!r}, which is neither one digit nor any character")


def finish(draft: str, of_blocks: bool) -> Iterator[str]:
    """Yield the globs over layer names of one draft."""
    glob, is_whole = draft.removeprefix(START), draft.endswith(END)
    glob = glob.removesuffix(END)
    if set(glob) & {START, END}:
        raise NoGlobError("it holds ^ or $ in the middle")
    if of_blocks and is_whole and glob[-1:] == DIGITS:
        is_whole = False
    elif of_blocks and is_whole and glob[-1:].isdigit():
        glob += ".*"
    glob = re.sub(r"\*+", "*", glob + ("" if is_whole else "*"))
    if glob.rstrip("*").endswith("bias"):
        raise NoGlobError("it selects biases")
    glob = widen_digits(glob)
    found = {glob, *without_suffix(TOKEN.findall(glob.removesuffix("*") or "*"), WEIGHT)}
    yield from sorted(each for each in found if not each.rstrip("*").endswith("weight"))


def widen_digits(glob: str) -> str:
    """Replace runs of digits by ``[0-9]*``, where the star can reach over no other layer of a block."""
    while DIGITS in glob:
        before, _, after = glob.partition(DIGITS)
        tail = after.replace(DIGITS, "*")
        for layer in INNER_LAYERS:
            name = f".{layer}" + (WEIGHT if "weight" in tail else "")
            if fnmatchcase(name, f"*{tail}") and not fnmatchcase(name, tail):
                raise NoGlobError(f"a star for the digits would also select {layer}")
        glob = re.sub(r"\*+", "*", f"{before}[0-9]*{after}")
    return glob


def without_suffix(tokens: list[str], suffix: str) -> set[str]:
    """Return globs that match a name where the tokens match the name with the suffix behind it."""
    if not suffix:
        return {"".join(tokens)}
    if not tokens:
        return set()
    *head, last = tokens
    if last == "*":
        shorter = (without_suffix(head, suffix[:end]) for end in range(1, len(suffix) + 1))
        return {"".join(tokens)}.union(*shorter)
    return without_suffix(head, suffix[:-1]) if fnmatchcase(suffix[-1], last) else set()
