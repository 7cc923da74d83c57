"""Writes docs/methods.md: one row for each method that lora_ops/registry.py knows.

python tools/methods_table.py            writes it
python tools/methods_table.py --check    says whether it is up to date
"""

import argparse
import sys
from pathlib import Path

import lora_ops  # noqa: F401  (declares the methods)
from lora_ops.registry import BY_DESIGN, CHANGES, Method, methods

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"

GROUPS = {
    "The operator and its layers": ("functional", "dora", "nn", "quant"),
    "Initialisations": ("init",),
    "Factor providers": ("factors",),
    "Optimiser pieces": ("optim",),
    "Training methods": ("methods",),
    "Adapters and their composition": ("adapters", "compose", "multi", "stacking"),
}


def group_of(method: Method) -> str:
    part = method.code.__module__.split(".")[1]
    return next(group for group, parts in GROUPS.items() if part in parts)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def row(m: Method) -> str:
    file, name = m.test.split("::")
    test = f"[{name}](../tests/{file})"
    return f"| **{m.name}** | {cell(m.equation)} | `{cell(m.use)}` | {m.changes} | {cell(m.source)} | {test} | {cell(m.note)} |"


def page() -> str:
    letters = ", ".join(f"{letter} {what}" for letter, what in CHANGES.items())
    lines = [
        "# Methods",
        "",
        f"The {len(methods())} systems of the LoRA family that `lora_ops` has, in PyTorch's layouts: x (M, K), W0 (N, K), "
        "A (r, K), B (N, r), scaling s. Names are those of `lora_ops`. Each is declared beside its code, with its docstring; "
        "`python tools/methods_table.py` makes this page of the declarations.",
        "",
        f"What a method changes: {letters}. The test is the one that proves what identifies the method.",
        "",
    ]
    for group in GROUPS:
        lines += [f"## {group}", "", "| method | equation | use | changes | source | test | found on the way |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [row(m) for m in sorted(methods().values(), key=lambda m: m.name.lower()) if group_of(m) == group]
        lines.append("")
    lines += ["## Left out by design", "", "| system | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in BY_DESIGN.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == page() else f"{PAGE} is not what {__file__} writes")
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(page())
    temporary.replace(PAGE)


if __name__ == "__main__":
    main()
