"""Permitted imports: between the rooms of each package, and of third-party libraries.

A room is a module or a sub-package. The tables list for each room the rooms and the libraries that
it may import. Imports within functions, under ``if TYPE_CHECKING`` and in doctests count, too.
"""

import ast
import doctest
import sys
from dataclasses import dataclass
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "integrations")
PACKAGES = ("ipa_core", "ipa_torch", "ipa_timm", "ipa_hf", "ipa_sklearn")

CORE = {
    "ipa_core",
    "ipa_core.caller_warnings",
    "ipa_core.documentation",
    "ipa_core.optional_dependencies",
    "ipa_core.errors",
    "ipa_core.io",
    "ipa_core.settings",
    "ipa_core.text_table",
}
_LAYERS = CORE | {
    "ipa_torch.errors",
    "ipa_torch._settings",
    "ipa_torch._layer_rank",
    "ipa_torch._float64",
}
_CAPTURE = _LAYERS | {"ipa_torch._layers"}
_DISTRIBUTED = _CAPTURE | {"ipa_torch._capture"}
_WING = _DISTRIBUTED | {
    "ipa_core.learners",
    "ipa_torch._distributed",
    "ipa_torch.layer_projectors",
}
_ALL_WINGS = _WING | {"ipa_torch._fit", "ipa_torch._gradient", "ipa_torch._adapters"}
_BRIDGE = CORE | {"ipa_torch", "ipa_torch.extension"}

#: Room: rooms that it may import. A room may import itself.
ROOMS = {
    "ipa_core.caller_warnings": set(),
    "ipa_core.documentation": set(),
    "ipa_core.errors": {"ipa_core.documentation"},
    "ipa_core.text_table": set(),
    "ipa_core.optional_dependencies": {"ipa_core.errors"},
    "ipa_core._sparse_rows": set(),
    "ipa_core._torch_modes": set(),
    "ipa_core._array": {"ipa_core.errors", "ipa_core._sparse_rows", "ipa_core._torch_modes"},
    "ipa_core.settings": {"ipa_core.errors"},
    "ipa_core._weight_validation": {"ipa_core.errors", "ipa_core._array"},
    "ipa_core._threads": {"ipa_core._torch_modes"},
    "ipa_core._linalg": {"ipa_core._array", "ipa_core._threads"},
    "ipa_core.rank_allocation": {"ipa_core.errors", "ipa_core._array", "ipa_core.settings"},
    "ipa_core.cholesky": {"ipa_core.errors", "ipa_core._array", "ipa_core.settings"},
    "ipa_core.whitening_transform": {"ipa_core.errors", "ipa_core._array", "ipa_core.settings"},
    "ipa_core.projector": {
        "ipa_core.errors",
        "ipa_core._array",
        "ipa_core._torch_modes",
        "ipa_core.settings",
        "ipa_core._weight_validation",
        "ipa_core.whitening_transform",
    },
    "ipa_core.io": {
        "ipa_core.caller_warnings",
        "ipa_core.optional_dependencies",
        "ipa_core.errors",
        "ipa_core._sparse_rows",
        "ipa_core._array",
        "ipa_core.settings",
        "ipa_core.projector",
    },
    "ipa_core.learners": {
        "ipa_core.errors",
        "ipa_core.settings",
        "ipa_core._weight_validation",
        "ipa_core._sparse_rows",
        "ipa_core._array",
        "ipa_core._torch_modes",
        "ipa_core._linalg",
        "ipa_core.projector",
    },
    "ipa_core.metrics": {
        "ipa_core.errors",
        "ipa_core.settings",
        "ipa_core._array",
        "ipa_core._torch_modes",
        "ipa_core.io",
        "ipa_core.learners",
        "ipa_core.projector",
    },
    "ipa_core.plotting": {
        "ipa_core.optional_dependencies",
        "ipa_core.errors",
        "ipa_core._array",
        "ipa_core.metrics",
        "ipa_core.projector",
    },
    "ipa_core.dask_backend": {
        "ipa_core.optional_dependencies",
        "ipa_core.errors",
        "ipa_core.io",
        "ipa_core.learners",
        "ipa_core.projector",
    },
    "ipa_core.fit": {
        "ipa_core.errors",
        "ipa_core.io",
        "ipa_core.learners",
        "ipa_core.projector",
        "ipa_core.dask_backend",
    },
    "ipa_core": {
        "ipa_core.cholesky",
        "ipa_core.errors",
        "ipa_core.fit",
        "ipa_core.io",
        "ipa_core.learners",
        "ipa_core.metrics",
        "ipa_core.projector",
        "ipa_core.rank_allocation",
        "ipa_core.whitening_transform",
    },
    "ipa_core.__main__": {
        "ipa_core",
        "ipa_core._array",
        "ipa_core.documentation",
        "ipa_core.errors",
        "ipa_core.io",
        "ipa_core.plotting",
        "ipa_core.text_table",
    },
    "ipa_torch.errors": CORE,
    "ipa_torch._float64": set(),
    "ipa_torch._settings": CORE,
    "ipa_torch._layer_rank": CORE | {"ipa_torch.errors"},
    "ipa_torch.layer_projectors": _LAYERS,
    "ipa_torch._layers": _LAYERS,
    "ipa_torch._capture": _CAPTURE,
    "ipa_torch._distributed": _DISTRIBUTED,
    "ipa_torch._fit": _WING,
    "ipa_torch._gradient": _WING,
    "ipa_torch._adapters": _WING,
    "ipa_torch.extension": _ALL_WINGS,
    "ipa_torch": _ALL_WINGS,
    "ipa_timm": _BRIDGE,
    "ipa_hf": _BRIDGE,
    "ipa_sklearn": CORE | {"ipa_core.learners"},
}

_BRIDGE_LIBRARIES = {"torch.*", "safetensors", "safetensors.torch"}
#: Package or room: libraries that it may import; ``name.*`` includes the library's submodules.
#: A submodule that is not listed, such as ``safetensors.torch``, would import another library.
#: ``?`` is an import by a name that is computed.
LIBRARIES = {
    "ipa_core": set(),
    "ipa_core._sparse_rows": {"numpy"},
    "ipa_core._torch_modes": {"array_api_compat", "torch"},
    "ipa_core._array": {"array_api_compat", "numpy"},
    "ipa_core._threads": {"array_api_compat", "threadpoolctl"},
    "ipa_core.optional_dependencies": {"?"},  # optional packages, by an argument
    "ipa_core.io": {"numpy", "safetensors", "safetensors.numpy", "safetensors.torch"},
    "ipa_core.io._formats": {"numpy", "pyarrow.*", "safetensors", "?"},
    "ipa_core.dask_backend": {"dask.*", "distributed"},
    "ipa_core.__main__": {"tqdm.*"},
    "ipa_torch": {"numpy", "torch.*", "tqdm.*", "safetensors", "safetensors.torch"},
    "ipa_timm": _BRIDGE_LIBRARIES | {"timm.*", "tqdm"},
    "ipa_hf": _BRIDGE_LIBRARIES
    | {"accelerate.*", "PIL.*", "matplotlib.*", "peft.*", "transformers.*"},
    "ipa_sklearn": {"numpy", "scipy.*", "sklearn.*"},
}
#: Package: libraries that its doctests may import besides.
EXAMPLE_LIBRARIES = {
    "ipa_core": {"numpy", "dask.*", "torch"},
    "ipa_torch": {"numpy"},
    "ipa_hf": {"numpy"},
}


@dataclass(frozen=True)
class Import:
    """An import statement: of a module, by a module, in a doctest or not."""

    importer: str
    imported: str
    in_example: bool
    names: tuple[str, ...] = ()


def room_of(module: str, table) -> str:
    """Return the longest prefix of a module in a table."""
    parts = module.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(prefix for prefix in prefixes if prefix in table)


def modules(folders):
    """Yield name and source of each module of the packages."""
    for folder in folders:
        for package in PACKAGES:
            for path in sorted((folder / package).rglob("*.py")):
                parts = path.relative_to(folder).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                yield name, path.read_text(), parts[-1] == "__init__"


def imports_of(name, source, is_package, known, in_example=False):
    """Yield the imports of a module, and those of its doctests."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, in_example)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join([*up, *([base] if base else [])])
            names = tuple(alias.name for alias in node.names)
            inner = [f"{base}.{own}" for own in names if f"{base}.{own}" in known]
            for module in inner:
                yield Import(name, module, in_example)
            if len(inner) < len(names):
                yield Import(name, base, in_example, names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            module = getattr(node.args[0], "value", "?")
            yield Import(name, module, in_example)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not in_example:
            for example in doctest.DocTestParser().get_examples(node.value):
                yield from imports_of(name, example.source, is_package, known, in_example=True)


def _called(node):
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def forbidden(folders):
    """Return the imports that the tables do not permit."""
    sources = list(modules(folders))
    known = {name for name, _, _ in sources}
    found = [
        each for source in sources for each in imports_of(*source, known) if not _permitted(each)
    ]
    return sorted({f"{each.importer} imports {each.imported}" for each in found})


def _permitted(each):
    top = each.imported.partition(".")[0]
    if top in PACKAGES:
        return _room_permitted(each)
    return top in sys.stdlib_module_names or _library_permitted(each)


def _room_permitted(each):
    importer, imported = room_of(each.importer, ROOMS), room_of(each.imported, ROOMS)
    permitted = ROOMS[importer] | {importer}
    if each.in_example:  # an example uses the package as its users do
        package = each.importer.partition(".")[0]
        permitted = permitted | {package, f"{package}.extension"}
    return imported in permitted


def _library_permitted(each):
    permitted = LIBRARIES[room_of(each.importer, LIBRARIES)]
    if each.in_example:
        permitted = permitted | EXAMPLE_LIBRARIES.get(each.importer.partition(".")[0], set())
    parts = each.imported.split(".")
    if any(".".join([*parts[:end], "*"]) in permitted for end in range(1, len(parts) + 1)):
        return True
    inner = {f"{each.imported}.{name}" for name in each.names}
    return each.imported in permitted and not any(map(_is_module, inner - permitted))


def _is_module(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module without submodules
        return False


def test_only_permitted_imports():
    assert forbidden(FOLDERS) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_have_no_circle(package):
    graph = {
        room: {other for other in others if other.partition(".")[0] == package}
        for room, others in ROOMS.items()
        if room.partition(".")[0] == package
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("path", "source", "edge"),
    [
        ("ipa_torch/_layers/a.py", "from ipa_torch._fit.fit import x", "ipa_torch._fit.fit"),
        ("ipa_torch/_fit/a.py", "def f():\n    import ipa_torch._gradient", "ipa_torch._gradient"),
        ("ipa_torch/_adapters/a.py", "from .._fit import fit", "ipa_torch._fit.fit"),
        ("ipa_torch/_layers/deep/a.py", "from ..._capture import x", "ipa_torch._capture.x"),
        ("ipa_torch/errors.py", "from ipa_torch import projectors", "ipa_torch.projectors"),
        ("ipa_torch/_fit/a.py", "from ipa_torch import merge", "ipa_torch"),
        ("ipa_torch/_fit/a.py", '"""Do.\n\n>>> import ipa_hf\n"""', "ipa_hf"),
        ("ipa_torch/_fit/a.py", '"""Do.\n\n>>> import ipa_torch._gradient.fit\n"""',
         "ipa_torch._gradient.fit"),
        ("ipa_hf/a.py", "from ipa_torch.errors import check_choice", "ipa_torch.errors"),
        ("ipa_timm/a.py", "import ipa_hf", "ipa_hf"),
        ("ipa_core/learners/a.py", "import ipa_core.io.streams", "ipa_core.io.streams"),
        ("ipa_core/io/a.py", "from ipa_core import learners", "ipa_core.learners"),
        ("ipa_core/projector.py", "from ipa_core import fit_projector", "ipa_core"),
        ("ipa_core/learners/a.py", "import numpy as np", "numpy"),
        ("ipa_core/learners/a.py", "from safetensors.torch import save", "safetensors.torch"),
        ("ipa_core/_array.py", "import safetensors.torch", "safetensors.torch"),
        ("ipa_core/io/a.py", "from safetensors import flax", "safetensors"),
        ("ipa_core/fit.py", 'import_module("torch")', "torch"),
        ("ipa_core/fit.py", "if TYPE_CHECKING:\n    import torch", "torch"),
    ],
)  # fmt: skip
def test_a_planted_edge_is_found(tmp_path, path, source, edge):
    for package in ("_fit/fit", "_gradient/fit", "_capture/x", "projectors", "errors"):
        module = tmp_path / "ipa_torch" / f"{package}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.touch()
        (module.parent / "__init__.py").touch()
    (tmp_path / "ipa_core" / "learners").mkdir(parents=True)
    (tmp_path / "ipa_core" / "learners" / "__init__.py").touch()
    planted = tmp_path / path
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(source)
    importer = path.removesuffix(".py").replace("/", ".")
    assert forbidden([tmp_path]) == [f"{importer} imports {edge}"]
