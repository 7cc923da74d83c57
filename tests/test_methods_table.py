"""docs/methods.md and the declarations that it is made from: nothing in it is without code and a test."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_ops
from lora_ops.registry import BY_DESIGN, Method, method, methods

TESTS = Path(__file__).parent
ALL = pytest.mark.parametrize("m", methods().values(), ids=methods())


def test_the_page_is_up_to_date() -> None:
    subprocess.run([sys.executable, str(TESTS.parent / "tools" / "methods_table.py"), "--check"], check=True)


@ALL
def test_its_test_exists(m: Method) -> None:
    file, name = m.test.split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def resolved(node: ast.expr) -> Any:
    """What `a.b.c` is, a being lora_ops, torch or public in lora_ops; None for a name that the reader has."""
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value)
        return None if owner is None else getattr(owner, node.attr)
    assert isinstance(node, ast.Name)
    return {"lora_ops": lora_ops, "torch": torch}.get(node.id, getattr(lora_ops, node.id, None))


@ALL
def test_its_line_of_use_calls_what_exists(m: Method) -> None:
    calls = [node for node in ast.walk(ast.parse(m.use)) if isinstance(node, ast.Call)]
    ours = 0
    for call in calls:
        function = resolved(call.func) if isinstance(call.func, ast.Name | ast.Attribute) and rooted(call.func) else None
        if function is None or not getattr(function, "__module__", "").startswith("lora_ops"):
            continue
        ours += 1
        signature, keywords = inspect.signature(function), {k.arg: None for k in call.keywords if k.arg}
        if any(isinstance(a, ast.Starred) for a in call.args):
            assert keywords.keys() <= signature.parameters.keys()
        else:
            signature.bind(*[None] * len(call.args), **keywords)
    assert ours, m.use


def rooted(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


@ALL
def test_it_is_documented(m: Method) -> None:
    assert inspect.getdoc(m.code)
    assert m.equation and m.source
    assert m.name not in BY_DESIGN


def test_a_name_is_declared_once() -> None:
    options = {"equation": "y = x", "use": "f()", "changes": "I", "source": "none", "test": "test_a.py::test_b"}
    with pytest.raises(ValueError, match="'LoRA' is declared twice"):
        method("LoRA", **options)(len)
    with pytest.raises(ValueError, match="changes must be letters"):
        method("another", **{**options, "changes": "X"})(len)
    assert "another" not in methods()
