"""The rules of CONTRIBUTING.md that a machine can hold."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xiangxin_kernels

import xiangxin_fast

ROOT = Path(__file__).parents[1]
PRODUCT = ("kernels", "xiangxin_fast", "train")
ROOMS = (*PRODUCT, "bench", "tests")
WRITTEN = (".py", ".md", ".toml", ".txt", ".cff", ".yml")

FRONT_DOOR_OF_KERNELS = {
    "attention",
    "cross_entropy",
    "decode_attention",
    "decode_block",
    "decode_head",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "parallel_block",
}
QUANTIZATION = {"QuantizedWeight", "default_group", "dequantize", "quantize"}
FRONT_DOOR_OF_FAST = {"Generator", "Phi", "PhiConfig", "load_pretrained", "save_pretrained"}


def _python_files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def _written_files() -> Iterator[Path]:
    for path in (*ROOT.iterdir(), *(p for room in ROOMS for p in (ROOT / room).rglob("*"))):
        if path.is_file() and (path.suffix in WRITTEN or path.name in ("Makefile", "run")):
            yield path


def _imports(path: Path) -> Iterator[str]:
    """The absolute imports of a file, dotted, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_rooms_import_one_way():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 2 kept" in done.stdout


def test_each_room_imports_only_what_it_may():
    """Kernels know torch and triton (and the interpreter's numpy); the rooms right of them use their front door."""
    wrong = []
    for path in _python_files("kernels"):
        allowed = {"torch", "triton", *sys.stdlib_module_names} | ({"numpy"} if path.name == "_interpret.py" else set())
        wrong += [f"{_name(path)}: {name}" for name in _imports(path) if name.split(".")[0] not in allowed]
    for path in _python_files("xiangxin_fast", "train"):
        peer = () if path == ROOT / "xiangxin_fast/hf_peer.py" else ("transformers",)
        banned = ("xiangxin_kernels.", "bench", "tests", *peer)
        wrong += [f"{_name(path)}: {name}" for name in _imports(path) if name.startswith(banned)]
    wrong += [f"{_name(path)}: {n}" for path in _python_files("bench") for n in _imports(path) if n.startswith("tests")]
    assert wrong == []


def test_front_doors_are_frozen():
    """To add a public name is a decision: it goes in here too."""
    names = (
        {"document_bounds"}
        | QUANTIZATION
        | {"linear", "prepack", "unpacked"}
        | FRONT_DOOR_OF_KERNELS
        | {f"{name}_ref" for name in FRONT_DOOR_OF_KERNELS}
    )
    assert set(xiangxin_kernels.__all__) == names
    assert all(callable(getattr(xiangxin_kernels, name)) for name in names)
    assert set(xiangxin_fast.__all__) == FRONT_DOOR_OF_FAST
    assert all(callable(getattr(xiangxin_fast, name)) for name in FRONT_DOOR_OF_FAST)


def test_kernels_is_a_folder_and_not_a_package():
    """`kernels` is the import name of a Hugging Face package that transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_a_person_can_hold_a_file():
    lengths = {_name(path): len(path.read_text().splitlines()) for path in _python_files(*ROOMS)}
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}


def test_sizes_of_the_architecture_live_in_config():
    sizes = {2560, 10240, 51200, 2779683840}
    wrong = []
    for path in _python_files(*PRODUCT):
        if path != ROOT / "xiangxin_fast/config.py":
            constants = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
            wrong += [f"{_name(path)}:{n.lineno}: {n.value}" for n in constants if n.value in sizes]
    assert wrong == []


def test_nothing_in_the_product_runs_what_it_reads():
    """No pickle in any guise, no code of a checkpoint's."""
    modules = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
    wrong = []
    for path in _python_files(*PRODUCT, "bench"):
        wrong += [f"{_name(path)}: {name}" for name in _imports(path) if name.split(".")[0] in modules]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "eval", "exec", "yaml.load"):
                wrong.append(f"{_name(path)}:{node.lineno}: {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                if ast.unparse(node.value) != "False":
                    wrong.append(f"{_name(path)}:{node.value.lineno}: {node.arg}")
    assert wrong == []


def test_no_file_knows_a_machine_or_leaves_work_for_later():
    found = re.compile(r"/(?:home|root|Users|work|mnt|data)/\w+|\b(?:TODO|FIXME|XXX)\b")
    wrong = []
    for path in _written_files():
        if path != Path(__file__):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                wrong += [f"{_name(path)}:{number}: {match}" for match in found.findall(line)]
    assert wrong == []


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_style(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _is_path(word: str, parent: Path) -> bool:
    return bool(re.fullmatch(r"[\w./-]+(\.\w+|/)", word)) or (parent / word).is_file()


def _tree_of(readme: str) -> dict[str, set[str]]:
    """Folder -> names, from the code block of a README that draws the repository: one of its lines starts "kernels/".

    A line is an indent, drawn or blank, then one or more paths, then words about them.
    """
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.M | re.S)
    block = next(text for text in blocks if re.search("^kernels/", text, re.M))
    tree, folders = {}, [(-1, "")]
    for line in block.splitlines():
        drawing, rest = re.fullmatch(r"([\s│├└─|`]*)(.*)", line).groups()
        while folders[-1][0] >= len(drawing):
            folders.pop()
        parent = folders[-1][1]
        for word in rest.split():
            if not _is_path(word, ROOT / parent):
                break
            tree.setdefault(parent, set()).add(word)
            if word.endswith("/"):
                folders.append((len(drawing), f"{parent}{word}"))
    return tree


def test_the_readme_draws_the_repository_as_it_is():
    """Every path it names exists, and a folder whose files it names has no other Python file."""
    tree = _tree_of((ROOT / "README.md").read_text())
    named = {f"{folder}{name}" for folder, names in tree.items() for name in names}
    assert {path for path in named if not (ROOT / path).exists()} == set()
    assert {room for room in ROOMS if not any(path.startswith(f"{room}/") for path in named)} == set()
    drawn = [folder for folder, names in tree.items() if any(name.endswith(".py") for name in names)]
    files = {_name(path) for folder in drawn for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"}
    assert files - named == set()
