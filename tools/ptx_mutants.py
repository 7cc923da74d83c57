"""Mutants of PTX: every way to get one instruction wrong that a person or a compiler might."""

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from ptx_bits import same, shifted_out, zero_bits

OPERATORS = {
    "add": "sub", "sub": "add", "mul": "add", "and": "or", "or": "and", "xor": "or", "min": "max", "max": "min", "shl": "shr",
    "shr": "shl", "div": "mul.lo",
}  # fmt: skip
COMPARISONS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}
WITH_IMMEDIATES = (
    "add", "sub", "mul", "mad", "or", "xor", "min", "max", "mov", "setp", "selp", "bfi", "prmt",
    "cp.async.wait_group",
)  # fmt: skip


def _operator(opcode: str) -> str | None:
    name, _, rest = opcode.partition(".")
    if name not in OPERATORS or opcode == "xor.pred":
        return None
    if name in ("add", "sub", "min", "max", "div") or rest == "pred":
        return f"{OPERATORS[name]}.{rest}"
    if name == "mul" and rest.startswith(("lo.", "f32")):
        return f"add.{rest.removeprefix('lo.')}"
    if name in ("shl", "shr"):
        return f"{OPERATORS[name]}.{'b' if name == 'shr' else 'u'}{rest[1:]}"
    return f"{OPERATORS[name]}.{rest}" if name in ("and", "or", "xor") else None


def _width(opcode: str) -> int:
    """Bytes that an access moves per lane: what an address is off by."""
    if opcode.startswith(("ldmatrix", "cp.async")):
        return 16
    vector = re.search(r"\.v(\d)", opcode)
    return int(re.search(r"\.[busf](\d+)$", opcode)[1]) // 8 * (int(vector[1]) if vector else 1)


def _register_type(item: str) -> str:
    return re.match(r"%?[a-z]*", item)[0]


def _masks(mask: int) -> tuple[int, int]:
    """One bit less at the lower end and one more, or where there is none below, one more at the upper end."""
    low = mask & -mask
    return mask ^ low, mask | low >> 1 if low > 1 else mask | mask + 1


def changes(line: str, written: dict[str, str], constants: dict[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Kind and text of every mutant of one line of PTX. `written`: by type, the register that was written last before it.
    `constants`: of registers whose value is known, the number; another one of the same value is no change."""
    constants = constants or {}
    parts = re.fullmatch(r"(\s*)(@!?%p\d+\s+)?([a-z][\w.]*)(\s+.*)?;(.*)", line)
    if not parts:
        return
    indent, guard, opcode, operands, end = (p or "" for p in parts.groups())

    def made(opcode: str = opcode, operands: str = operands, guard: str = guard) -> str:
        return f"{indent}{guard}{opcode}{operands};{end}"

    if guard:
        yield "predicate dropped", made(guard="")
        yield "predicate negated", made(guard=guard.replace("@!", "@") if "!" in guard else guard.replace("@", "@!"))
    if not opcode.startswith(("bra", "ret")):
        yield "dropped", f"{indent}//{line.strip()}"
    if other := _operator(opcode):
        yield "operator", made(other)
    name = opcode.split(".")[0]
    if name == "setp":
        comparison = opcode.split(".")[1]
        yield "comparison", made(opcode.replace(f".{comparison}.", f".{COMPARISONS[comparison]}."))

    items = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]]+", operands)

    def joined(changed: list[str]) -> str:
        return made(operands=" " + ", ".join(changed))

    ordered = name in ("sub", "selp") or (name == "setp" and not re.match(r"setp\.(eq|ne)", opcode)) or "x2.f32" in opcode
    if ordered and items[1] != items[2]:
        yield "operands swapped", joined([items[0], items[2], items[1], *items[3:]])
    for i, item in enumerate(items):
        before, after = items[:i], items[i + 1 :]
        other = written.get(_register_type(item), item)
        if i > 0 and other not in items and (item not in constants or constants.get(other) != constants[item]):
            yield "operand", joined([*before, other, *after])
        if item[0] == "{" and not (name == "mma" and i in (0, 3)) and "param" not in opcode:
            registers = item[1:-1].split(",")
            if len(registers) > 1 and registers[0] != registers[1]:
                yield (
                    "registers swapped",
                    joined([*before, f"{{{','.join([registers[1], registers[0], *registers[2:]])}}}", *after]),
                )
        elif item[0] == "[":
            base, _, offset = item[1:-1].partition("+")
            for sign in (1, -1):
                yield "address", joined([*before, f"[{base}+{int(offset or 0) + sign * _width(opcode)}]", *after])
        elif re.fullmatch(r"-?\d+", item) and name in ("shl", "shr"):
            for by in (1, -1):
                yield "shift", joined([*before, str(int(item) + by), *after])
        elif re.fullmatch(r"-?\d+", item) and name == "and":
            for mask in _masks(int(item)):
                yield "immediate", joined([*before, str(mask), *after])
        elif re.fullmatch(r"-?\d+", item) and opcode.startswith(WITH_IMMEDIATES):
            for by in (1, -1):
                beyond_last_bit = name == "bfi" and i == 4 and items[3].isdigit() and int(items[3]) + int(item) + by > 32
                if not beyond_last_bit and (int(item) + by >= 0 or opcode not in ("cp.async.wait_group", "mov.pred")):
                    yield "immediate", joined([*before, str(int(item) + by), *after])
        elif re.fullmatch(r"0f[0-9A-F]{8}", item):
            yield "immediate", joined([*before, "0f3F800000" if item == "0f00000000" else "0f00000000", *after])
    if opcode.startswith("ldmatrix"):
        yield "transposed", made(opcode.replace(".trans", "") if ".trans" in opcode else opcode.replace(".x4", ".x4.trans"))


def _follow(constants: dict[str, str], line: str) -> None:
    """What a line does to the registers whose values are known."""
    if line.endswith(":"):
        constants.clear()  # others come here, too
    elif moved := re.fullmatch(r"\s*mov\.\w+\s+(%\w+), (\S+);", line):
        value = constants.get(moved[2], moved[2])
        constants.pop(moved[1], None)
        if not value.startswith("%"):
            constants[moved[1]] = value
    elif not re.match(r"\s*(st\.|bra)", line):
        for register in re.findall(r"%[a-z]+\d+", line):
            constants.pop(register, None)


# --- a module's kernels ---------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    kind: str
    line: int  # of the entry's own module
    before: str
    after: str


WHOLE_BYTES = 1 << 20  # a module that is no larger is parsed with each of its kernels, which may be launched together


class Entry(NamedTuple):
    """One kernel of a module, as the first one of a module of its own."""

    name: str
    text: str
    first_line: int  # of the kernel in the module that nvcc wrote
    header_lines: int

    def ptx_line(self, line: int) -> int:
        return self.first_line + line - self.header_lines

    def source(self, line: int) -> str:
        """The .cu line that the PTX line comes from."""
        lines = self.text.split("\n")
        files = dict(re.findall(r'^\s*\.file\s+(\d+) ".*?([^/"]+)"', self.text, re.M))
        for text in reversed(lines[:line]):
            if at := re.match(r"\s*\.loc\s+(\d+) ([1-9]\d*)", text):
                return f"{files[at[1]]}:{at[2]}"
        return ""

    def instructions(self) -> list[int]:
        """Their lines."""
        return [number for number, line in self._body() if re.fullmatch(r"\s*(@!?%p\d+\s+)?[a-z][\w.]*(\s+.*)?;.*", line)]

    def mutants(self) -> dict[str, list[Mutant]]:
        found: dict[str, list[Mutant]] = defaultdict(list)
        written: dict[str, str] = {}
        constants: dict[str, str] = {}
        body = [line for _, line in self._body()]
        zeros, dropped = zero_bits(body), shifted_out(body)
        copies = re.search(r"cp\.async\.c[ag]", self.text)
        for number, line in self._body():
            to_itself = re.fullmatch(r"\s*mov\.\w+\s+(%\w+), \1;", line)
            if to_itself or ("cp.async" in line and not copies):  # groups of no copies
                continue
            for kind, after in changes(line, written, constants):
                if not same(line, after, zeros, dropped):
                    found[kind].append(Mutant(kind, number, line.strip(), after))
            _follow(constants, line)
            if register := re.match(r"\s*[a-z][\w.]*\s+(%[a-z]+\d+),", line):
                written[_register_type(register[1])] = register[1]
        return found

    def _body(self) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self.text.split("\n")[self.header_lines :], self.header_lines):
            if line.startswith("}"):
                return
            yield number, line

    def with_(self, mutant: Mutant) -> str:
        lines = self.text.split("\n")
        lines[mutant.line] = mutant.after
        return "\n".join(lines)


def entries(module: str) -> list[Entry]:
    files = "\n".join(re.findall(r"^\s*\.file.*$", module, re.M))
    starts = [m.start() for m in re.finditer(r"^(\.\w+ )*\.entry ", module, re.M)]
    header = module[: starts[0]]
    bodies = [module[start : module.index("\n}", start) + 3] for start in starts]
    found = []
    for start, body in zip(starts, bodies, strict=True):
        others = [b for b in bodies if b is not body] if len(module) <= WHOLE_BYTES else []
        name = re.search(r"\.entry (\w+)", body)[1]
        text = "".join([header, body, *others, files, "\n"])
        found.append(Entry(name, text, module.count("\n", 0, start) + 1, header.count("\n")))
    return found


def drawn(mutants: dict[str, list[Mutant]], count: int, seed: str) -> list[Mutant]:
    """One of each kind in turn, until there are `count`."""
    draw = random.Random(seed)
    left = {kind: draw.sample(mutants[kind], len(mutants[kind])) for kind in draw.sample(sorted(mutants), len(mutants))}
    chosen: list[Mutant] = []
    while len(chosen) < count and any(left.values()):
        for some in left.values():
            if some and len(chosen) < count:
                chosen.append(some.pop())
    return chosen
