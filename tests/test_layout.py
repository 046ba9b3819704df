"""What may import what, and what loading the package costs."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import bizassist_nb

PACKAGE = Path(bizassist_nb.__file__).parent
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "unsloth",
    "bitsandbytes",
    "matplotlib",
    "scipy",
    "py3langid",
    "ipywidgets",
    "IPython",
}
# Modules that are about one of these from their first line on, and are only imported where they are used.
MAY = {
    "assistant/decoding.py": {"torch", "transformers", "peft"},
    "assistant/cuda/decode_graph.py": {"torch", "peft"},
    "assistant/cuda/nf4.py": {"torch"},
    "assistant/prefix_cache.py": {"torch", "transformers"},
    "training/cuda_graphs.py": {"torch", "peft", "transformers"},
    "training/trainer.py": {"torch", "transformers", "trl", "datasets"},
    "results/loss_plot.py": {"matplotlib"},
    "notebook/magics.py": {"IPython"},
    "notebook/completion.py": {"IPython"},
    "notebook/views.py": {"IPython", "ipywidgets"},
    **{f"notebook/panel/{path.name}": {"IPython", "ipywidgets"} for path in (PACKAGE / "notebook/panel").glob("*.py")},
}


@functools.cache
def modules():
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path, nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("name", modules())
def test_heavy_packages_are_imported_where_they_are_used(name):
    tree = ast.parse((PACKAGE / name).read_text("utf-8"))
    found = {module.partition(".")[0] for module in imports(name, tree.body)} & HEAVY
    assert found <= MAY.get(name, set())


# Rooms from top to bottom; those of one line stand side by side. Each imports only rooms below it.
ROOMS = [
    {"__main__", "__init__"}, {"notebook"}, {"api"}, {"training", "export"}, {"results"}, {"assistant"}, {"models"},
    {"runs"}, {"data"}, {"core"},
]  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def ours(name):
    """Modules of the package that it imports anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse((PACKAGE / name).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "bizassist_nb":
            folder = node.module.replace(".", "/").removeprefix("bizassist_nb").removeprefix("/")
            for alias in node.names:
                paths = (f"{folder}/{alias.name}.py", f"{folder}.py", f"{folder}/__init__.py", "__init__.py")
                yield next(path for path in map(str.lstrip, paths, "/" * 4) if path in modules())


def room(name):
    return name.partition("/")[0].removesuffix(".py")


@pytest.mark.parametrize("name", modules())
def test_each_room_imports_only_rooms_below_it(name):
    for imported in ours(name):
        assert room(imported) == room(name) or FLOOR[room(imported)] > FLOOR[room(name)], imported


def test_no_file_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter(
        {name: set(ours(name)) - {name} for name in modules()}
    ).prepare()  # CycleError names them


@pytest.mark.parametrize("name", modules())
def test_only_training_knows_trl_and_unsloth(name):
    tree = ast.parse((PACKAGE / name).read_text("utf-8"))
    found = {module.partition(".")[0] for module in imports(name, ast.walk(tree))} & {"trl", "unsloth"}
    assert not found or name.startswith("training/")


@pytest.mark.parametrize("name", [name for name in modules() if name != "assistant/cuda/kernels.py"])
def test_functions_fit_a_screen_and_take_few_parameters(name):
    """40 lines and five parameters beside self at most; Triton's kernels have what they need."""
    for node in ast.walk(ast.parse((PACKAGE / name).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([each for each in taken if each.arg not in ("self", "cls")]) <= 5, node.name
            assert node.end_lineno - node.lineno < 40, node.name


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, bizassist_nb; print(sorted({HEAVY!r} & {{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_there():
    for name in bizassist_nb.__all__:
        assert getattr(bizassist_nb, name).__name__ == name


def test_settings_page_is_up_to_date():
    root = PACKAGE.parent
    namespace = {"__name__": "page", "__file__": str(root / "docs" / "settings.py")}
    exec((root / "docs" / "settings.py").read_text("utf-8"), namespace)  # noqa: S102 - our own script
    assert (root / "docs" / "settings.md").read_text("utf-8") == namespace["text"]()
