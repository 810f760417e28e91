"""What ruff cannot know about kernels: each rule for kernels that a syntax tree can show, and proof that it bites."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels/xiangxin_kernels"
DEVICE_QUERIES = {"get_device_capability", "get_device_properties", "is_available", "device_count", "current_device"}
NO_DEVICE_CODE = {"__init__.py", "_host.py", "_tuning.py", "_cpu.py"}  # _interpret.py patches the interpreter's tl


def _dotted(node: ast.AST) -> str:
    """`tl.math.exp` of an attribute or name, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def _is_program_id(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _dotted(node.func) in ("tl.program_id", "tl.num_programs")


def _is_widened(node: ast.AST) -> bool:
    """x.to(tl.int64) or tl.cast(x, tl.int64)."""
    if not isinstance(node, ast.Call):
        return False
    converts = isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "cast")
    return converts and any(_dotted(argument) == "tl.int64" for argument in node.args)


def _narrow_names(function: ast.FunctionDef) -> set[str]:
    """Names bound to a program index in 32 bits, directly or as the variable of a loop that starts at one."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _is_program_id(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and any(map(_is_program_id, node.iter.args)):
            names.add(node.target.id)
    return names


def _check_function(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str]]:
    narrow = _narrow_names(function)
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for index, other in ((node.left, node.right), (node.right, node.left)):
                is_index = _is_program_id(index) or (isinstance(index, ast.Name) and index.id in narrow)
                if is_index and "stride" in ast.unparse(other) and not _is_widened(other):
                    yield node, "a program index times a stride passes 2^31: widen it with .to(tl.int64)"


def _compiled_only(tree: ast.AST) -> set[ast.AST]:
    """What stands under an `if` on one constexpr alone, which the host leaves False in the interpreter."""
    branches = [node.body for node in ast.walk(tree) if isinstance(node, ast.If) and _is_constexpr(node.test)]
    return {inner for branch in branches for statement in branch for inner in ast.walk(statement)}


def _is_constexpr(test: ast.AST) -> bool:
    return isinstance(test, ast.Name) and test.id.isupper()


def _check_call(call: ast.Call, compiled_only: bool) -> Iterator[str]:
    name = _dotted(call.func)
    keywords = {keyword.arg for keyword in call.keywords}
    if name == "tl.load" and ("mask" in keywords or len(call.args) > 1) and "other" not in keywords:
        yield "a masked tl.load passes other=: what a GPU puts there is undefined"
    if name == "tl.dot" and "input_precision" not in keywords:
        yield "tl.dot passes input_precision=: its default changes between versions of Triton"
    if (name.startswith("tl.inline_asm") and not compiled_only) or "libdevice" in name:
        yield "no libdevice, and inline assembly behind a constexpr alone: the interpreter has neither"
    counts = len(call.args) > 1 and isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, int)
    if name == "tl.atomic_add" and not counts:
        yield "no floating-point atomics: their order, and with it the bits, would vary (counting arrivals is fine)"
    if name.endswith(("autotune", "heuristics")):
        yield "no autotuning at run time: ranks could differ; _tuning.py remembers"


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda):
            continue
        yield child
        yield from _at_import(child)


def lint(source: str, name: str) -> list[str]:
    """The findings in a kernel file: "name:line: why"."""
    tree = ast.parse(source)
    findings, compiled_only = [], _compiled_only(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            findings += _check_function(node)
        if isinstance(node, ast.Call):
            findings += [(node, why) for why in _check_call(node, node in compiled_only)]
        if isinstance(node, ast.Import | ast.ImportFrom) and "libdevice" in ast.unparse(node):
            findings.append((node, "no libdevice: the interpreter has none"))
        if name in NO_DEVICE_CODE and isinstance(node, ast.Attribute) and _dotted(node).startswith("tl."):
            findings.append((node, "device code lives in the kernel files and _device.py"))
    for node in _at_import(tree):
        if isinstance(node, ast.Call) and _dotted(node.func).rpartition(".")[2] in DEVICE_QUERIES:
            findings.append((node, "nothing asks a device at import"))
    return [f"{name}:{node.lineno}: {why}" for node, why in findings]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_kernel_files_keep_the_rules(path):
    assert lint(path.read_text(), path.name) == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("x = tl.load(p + offs, mask=offs < n)", "other="),
        ("x = tl.load(p + offs, offs < n)", "other="),
        ("acc = tl.dot(a, b, acc)", "input_precision"),
        ("p += tl.program_id(0) * x_stride_n", "2^31"),
        ("pid = tl.program_id(0)\n    p += x_stride_n * pid", "2^31"),
        ("for n in range(tl.program_id(0), N):\n        p += n * stride", "2^31"),
        ("y = tl.inline_asm_elementwise('', '', [], tl.float32, True, 1)", "inline assembly"),
        ("if n > 0:\n        y = tl.inline_asm_elementwise('', '', [], tl.float32, True, 1)", "inline assembly"),
        ("if PIN:\n        y = x\n    else:\n        tl.inline_asm_elementwise('')", "inline assembly"),
        ("y = tl.extra.cuda.libdevice.tanh(x)", "libdevice"),
        ("from triton.language.extra import libdevice", "libdevice"),
        ("tl.atomic_add(p, x)", "atomics"),
        ("f = triton.autotune(configs=[], key=[])", "autotuning"),
    ],
)
def test_each_rule_bites(line, why):
    findings = lint(f"def kernel():\n    {line}\n", "some_op.py")
    assert len(findings) == 1
    assert why in findings[0]


def test_rules_of_the_module_level_bite():
    assert "at import" in lint("ARCH = torch.cuda.get_device_capability()", "_tuning.py")[0]
    assert "device code" in lint("def f():\n    return tl.zeros([1])", "_host.py")[0]


def test_what_keeps_the_rules_passes():
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        "x = tl.load(x_ptr + row * x_stride_n, mask=offs < n, other=0.0)",
        "acc = tl.dot(a, b, acc, input_precision='ieee')",
        "for n in range(tl.program_id(0), N):\n        p += tl.cast(n, tl.int64) * x_stride_n",
        "arrived = tl.atomic_add(count_ptr + b, 1, sem='acq_rel')",
        "if PIN:\n        y = tl.inline_asm_elementwise('', '', [], tl.float32, True, 1)",
        "arch = torch.cuda.get_device_capability()",
    ]
    assert lint("def kernel():\n    " + "\n    ".join(lines), "some_op.py") == []
