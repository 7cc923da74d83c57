"""Which bits of a kernel's registers are always zero, and so which mutants are the instruction that they are made from.

Registers that are written once are looked at, in the order of the text: nvcc's PTX writes the others in loops and branches, and
of those nothing is known.
"""

import re
from collections import Counter
from collections.abc import Iterable

BITS = {"r": 32, "rd": 64, "rs": 16}
Zeros = dict[str, int]  # of a register, the bits that are zero


def bits_of(register: str) -> int:
    return BITS.get(register.strip("%0123456789"), 0)


def _mask(bits: int) -> int:
    return (1 << bits) - 1


def zeros_of(item: str, zeros: Zeros, bits: int) -> int:
    """Of a register or of a number."""
    if re.fullmatch(r"-?\d+", item):
        return ~int(item) & _mask(bits)
    return zeros.get(item, 0)


def _leading(zero: int, bits: int) -> int:
    return bits - (~zero & _mask(bits)).bit_length()


def _trailing(zero: int) -> int:
    return (~zero & zero + 1).bit_length() - 1


def _upper(count: int, bits: int) -> int:
    return _mask(bits) ^ _mask(max(0, bits - max(0, count)))


def _result(opcode: str, items: list[str], zeros: Zeros, threads: int) -> int:
    """The zero bits of what an instruction writes to items[0]."""
    name, bits = opcode.split(".")[0], bits_of(items[0])
    sources = [zeros_of(item, zeros, bits) for item in items[1:]]
    number = int(items[2]) if len(items) > 2 and items[2].isdigit() else None
    if name == "ld" and re.search(r"\.u(8|16)$", opcode) and ".v" not in opcode:
        return _mask(bits) & ~_mask(int(re.search(r"\d+$", opcode)[0]))
    if items[1] == "%tid.x":
        return _mask(bits) & ~_mask((threads - 1).bit_length())
    if name == "mov":
        return sources[0]
    if opcode in ("cvt.u64.u32", "cvt.u32.u16", "cvt.u32.u64"):
        read = bits_of(items[1])
        return (sources[0] | _mask(bits) & ~_mask(read)) & _mask(bits)
    if opcode.startswith("and.b"):
        return sources[0] | sources[1]
    if opcode.startswith(("or.b", "xor.b")) or name == "selp":
        return sources[0] & sources[1]
    if opcode.startswith("shl.b") and number is not None:
        return (sources[0] << number | _mask(number)) & _mask(bits)
    if name == "shr" and number is not None and (".u" in opcode or sources[0] >> bits - 1):
        return sources[0] >> number | _upper(number, bits)
    if name == "add" and bits:
        low = min(_trailing(s) for s in sources)
        return (_mask(low) | _upper(min(_leading(s, bits) for s in sources) - 1, bits)) & _mask(bits)
    if name == "min" and (".u" in opcode or all(s >> bits - 1 for s in sources)):
        return _upper(max(_leading(s, bits) for s in sources), bits)
    if name == "bfi" and items[3].isdigit() and items[4].isdigit():
        at, length = int(items[3]), int(items[4])
        field = _mask(length) << at & _mask(bits)
        return sources[0] << at & field | sources[1] & ~field
    return 0


def parsed(line: str) -> tuple[str, list[str]] | None:
    """Opcode and operands of an instruction without a guard that writes one integer register."""
    found = re.fullmatch(r"\s*([a-z][\w.]*)\s+(%(?:r|rd|rs)\d+), (.*);.*", line)
    return found and (found[1], [found[2], *re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^\s,]+", found[3])])


def zero_bits(lines: Iterable[str]) -> Zeros:
    lines = list(lines)
    threads = next((int(m[1]) for line in lines if (m := re.match(r"\s*\.maxntid (\d+)", line))), 1024)
    writes = Counter(
        register
        for line in lines
        if not re.match(r"\s*(@!?%p\d+\s+)?(st\.|cp\.|bar|bra)", line) and re.search(r"\w\s+\{?%", line)
        for register in re.findall(r"%(?:r|rd|rs)\d+", re.match(r"\s*(?:@!?%p\d+\s+)?[\w.]+\s+(\{[^}]*\}|[^,;]+)", line)[1])
    )
    zeros: Zeros = {}
    for line in lines:
        if (found := parsed(line)) and writes[found[1][0]] == 1:
            zeros[found[1][0]] = _result(*found, zeros, threads)
    return zeros


def shifted_out(lines: Iterable[str]) -> Zeros:
    """Of registers that are written once and read in one place, by a shift to the right: the bits that it drops."""
    lines = [line for line in lines if not line.lstrip().startswith((".", "//"))]
    found = [parsed(line) for line in lines]
    occurs = Counter(register for line in lines for register in re.findall(r"%(?:r|rd|rs)\d+", line))
    return {
        items[1]: _mask(int(items[2]))
        for opcode, items in filter(None, found)
        if opcode.startswith("shr.") and items[2].isdigit() and occurs[items[1]] == 2
    }


def same(before: str, after: str, zeros: Zeros, dropped: Zeros | None = None) -> bool:
    """Whether a mutant that has another number, or another operator, writes what the instruction writes, but for bits that are
    `dropped`."""
    old, new = parsed(before), parsed(after)
    if old is None or new is None or len(old[1]) != len(new[1]) or len(old[1]) < 3:
        return False
    bits = bits_of(old[1][0])
    (opcode, items), (other, changed) = old, new
    a, b = (zeros_of(item, zeros, bits) for item in items[1:3])
    if opcode == other and opcode.startswith("and.b") and items[1] == changed[1]:
        unread = a | (dropped or {}).get(items[0], 0)
        return (b ^ zeros_of(changed[2], zeros, bits)) & ~unread & _mask(bits) == 0 and changed[2].lstrip("-").isdigit()
    if {opcode.split(".")[0], other.split(".")[0]} <= {"or", "xor", "add"} and items == changed:
        return a | b == _mask(bits)
    if opcode == other and opcode.startswith("bfi") and items[:4] == changed[:4] and items[3].isdigit():
        at, length, now = int(items[3]), int(items[4]), int(changed[4])
        moved = (_mask(length) ^ _mask(now)) << at & _mask(bits)
        return moved & ~(a << at & b) == 0
    if opcode == other and opcode.startswith("bfi") and items[:3] == changed[:3] and items[4] == changed[4]:
        fields = [_mask(int(items[4])) << int(at) & _mask(bits) for at in (items[3], changed[3]) if at.isdigit()]
        return len(fields) == 2 and ~a & _mask(int(items[4])) == 0 and (fields[0] ^ fields[1]) & ~b == 0
    return False
