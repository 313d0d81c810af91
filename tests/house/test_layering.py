"""The layering of docs/design.md, read from the syntax of every module, and the habits that keep it.

Each rule is a function from the sources to complaints, so that a planted fault shows that it can complain.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"

# What each room may import, rooms below it included.
_GROUND = {"config", "files"}
_OPS = {"dist"}
_QUANTIZERS = {"ops", *_OPS}
_DATA = {*_GROUND}
_MODELS = {"quantizers", *_QUANTIZERS, *_GROUND}
_ABOVE_MODELS = {"models", "data", *_MODELS, *_DATA}
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "files": set(),
    "dist": set(),
    "ops": _OPS,
    "quantizers": _QUANTIZERS,
    "data": _DATA,
    "models": _MODELS,
    "train": _ABOVE_MODELS,
    "generate": _ABOVE_MODELS,
    "recipes": {
        "config",
        "data.config",
        "data.published",
        "data.standard_library",
        "models.config",
        "models.presets",
        "quantizers.config",
        "train.config",
    },
    "compat": {"train", *_ABOVE_MODELS},
    "cli": {"compat", "recipes", "train", "generate", *_ABOVE_MODELS},
    "__main__": {"cli"},
}

# Foreign packages: where they may be imported, at all and when the module is.
THIRD_PARTY: dict[str, set[str]] = {
    "torch": {"ops", "dist", "quantizers", "data", "models", "train", "generate", "compat", "cli"},
    "numpy": {"ops", "data", "train", "generate", "models", "compat"},
    "safetensors": {"models", "train", "generate"},
    "tyro": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"train"},
    "sentencepiece": {"data"},
    "PIL": {"data"},
    "triton": {"ops"},
    "msgpack": {"compat"},
    "huggingface_hub": {"models"},
}
NEVER_AT_MODULE_LEVEL = {"matplotlib", "triton", "msgpack", "huggingface_hub", "sentencepiece", "PIL"}
TORCH_FREE_ROOMS = {"config", "files", "recipes", "__main__"}

Sources = dict[str, str]  # dotted module name -> text, not to be changed
Rule = Callable[[Sources], list[str]]


@cache
def sources() -> Sources:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def nodes(text: str) -> list[tuple[ast.AST, str]]:
    """Every node of a module, with whether it runs in a function, only for a type checker, or ('') at import."""
    return list(_walk(parsed(text)))


def room(module: str) -> str:
    """`vqkit.ops.codebook` lives in `ops`; the package itself is ''."""
    return module.split(".")[1] if "." in module else ""


def imports(text: str, modules: Sources, *, at_import: bool = False) -> Iterator[str]:
    """Names of modules that a module imports, anywhere or only while it is imported itself."""
    for node, inside in nodes(text):
        if at_import and inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else node.module


def _walk(tree: ast.AST, inside: str = "") -> Iterator[tuple[ast.AST, str]]:
    for node in ast.iter_child_nodes(tree):
        where = inside
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            where = inside or "function"
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            where = inside or "types"
        yield node, where
        yield from _walk(node, where)


def rooms_import_only_what_lies_below(modules: Sources) -> list[str]:
    complaints = []
    for module, text in modules.items():
        for name in imports(text, modules):
            own = room(name) == room(module)
            if name.split(".")[0] != "vqkit" or own or room(module) == "":
                continue
            rest = name.split(".", 1)[1] if "." in name else ""
            allowed = ROOMS.get(room(module), set())
            if rest and not any(rest == a or rest.startswith(f"{a}.") for a in allowed):
                complaints.append(f"{module} imports {name}; {room(module)} may import {', '.join(sorted(allowed)) or 'no other room'}")
            if not rest and "__version__" not in text:
                complaints.append(f"{module} imports from vqkit itself; name the module that has it")
    return complaints


def every_module_is_in_a_known_room(modules: Sources) -> list[str]:
    return [f"{m}: {room(m)!r} is no room of the table" for m in modules if room(m) and room(m) not in ROOMS]


def foreign_packages_stay_where_they_belong(modules: Sources) -> list[str]:
    complaints = []
    for module, text in modules.items():
        for name in imports(text, modules):
            package = name.split(".")[0]
            if package == "vqkit" or package in sys.stdlib_module_names:
                continue
            if room(module) not in THIRD_PARTY.get(package, set()):
                complaints.append(f"{module} imports {name}, which is not for {room(module) or 'the package itself'}")
        for name in imports(text, modules, at_import=True):
            if name.split(".")[0] in NEVER_AT_MODULE_LEVEL:
                complaints.append(f"{module} imports {name} at module level; import it in the function that needs it")
    return complaints


def torch_free_modules_reach_no_torch(modules: Sources) -> list[str]:
    """Configurations, recipes, every package's `__init__` and what they import load nothing foreign."""
    packages = {m for m in modules if any(other.startswith(f"{m}.") for other in modules)}
    free = {m for m in modules if room(m) in TORCH_FREE_ROOMS or m.endswith(".config") or m in packages}
    complaints = []
    for module in sorted(free):
        reached, ways = [module], {module: module}
        for name in reached:
            for imported in imports(modules[name], modules, at_import=True):
                if imported in modules and imported not in ways:
                    reached.append(imported)
                    ways[imported] = f"{ways[name]} -> {imported}"
                elif imported.split(".")[0] not in {"vqkit", *sys.stdlib_module_names}:
                    complaints.append(f"{module} is torch-free and imports {ways[name]} -> {imported}")
    return list(dict.fromkeys(complaints))


def collectives_stay_in_dist_and_train(modules: Sources) -> list[str]:
    return [
        f"{module}:{node.lineno} uses torch.distributed"
        for module, text in modules.items()
        if room(module) not in {"dist", "train"}
        for node, _ in nodes(text)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed")
        or (isinstance(node, ast.Import) and any(a.name.startswith("torch.distributed") for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"))
        or (isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "distributed" for a in node.names))
    ]


def printing_and_parsing_stay_in_the_command_line(modules: Sources) -> list[str]:
    said = {"print", "input", "breakpoint"}
    used = {"sys.stdout", "sys.stderr", "sys.argv", "sys.exit", "logging.basicConfig"}
    complaints = []
    for module, text in modules.items():
        if room(module) in {"cli", "__main__"}:
            continue
        for node, _ in nodes(text):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in said:
                complaints.append(f"{module}:{node.lineno} calls {node.func.id}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in used:
                complaints.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
        complaints += [f"{module} imports {n}" for n in imports(text, modules) if n.split(".")[0] in {"argparse", "getopt", "optparse"}]
    return complaints


def checks_are_no_asserts(modules: Sources) -> list[str]:
    return [
        f"{module}:{node.lineno} asserts; raise ValueError or TypeError"
        for module, text in modules.items()
        for node, _ in nodes(text)
        if isinstance(node, ast.Assert)
    ]


def nothing_is_pickled(modules: Sources) -> list[str]:
    forbidden = {"torch.load", "torch.save"}
    complaints = []
    for module, text in modules.items():
        complaints += [
            f"{module} imports {n}" for n in imports(text, modules) if n.split(".")[0] in {"pickle", "shelve", "marshal", "dill"}
        ]
        for node, _ in nodes(text):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in forbidden:
                complaints.append(f"{module}:{node.lineno} uses {ast.unparse(node)}; write safetensors and JSON")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                complaints.append(f"{module}: allow_pickle")
    return complaints


def importing_does_nothing(modules: Sources) -> list[str]:
    """No seed, device query, thread count, default dtype or environment change when a module is imported."""
    changing = ("torch.manual_seed", "torch.cuda.", "torch.set_", "torch.backends.", "np.random.", "random.seed", "os.environ", "warnings.")
    return [
        f"{module}:{node.lineno} does {ast.unparse(node)} at import"
        for module, text in modules.items()
        for node, inside in nodes(text)
        if not inside and isinstance(node, ast.Attribute) and ast.unparse(node).startswith(changing)
    ]


# The facade has the names of its peer, whatever these are.
PEERS_NAMES = "vqkit.compat.vector_quantize_pytorch."


def names_follow_the_house(modules: Sources) -> list[str]:
    complaints = []
    for module, text in modules.items():
        own = not module.startswith(PEERS_NAMES)
        if own and module.rsplit(".", 1)[-1] in {"utils", "util", "helpers", "common", "misc"}:
            complaints.append(f"{module}: name the module after its subject")
        for node, _ in nodes(text):
            if own and isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith(("get_", "maybe_")):
                complaints.append(f"{module}:{node.lineno} {node.name}: name what it returns or does")
        if len(ast.get_docstring(parsed(text)) or "") < 20:
            complaints.append(f"{module} does not say what it is for")
        if not text.isascii():
            complaints.append(f"{module} is not ASCII")
    return complaints


def functions_are_not_called_like_their_module(modules: Sources) -> list[str]:
    """Once `room.name` the module is imported it hides `room.name` the function, so a lazy name must not be a submodule's."""
    complaints = []
    for module, text in modules.items():
        table = next((n for n in parsed(text).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_MODULES"), None)
        for name in ast.literal_eval(table.value) if table else ():
            if f"{module}.{name}" in modules:
                complaints.append(f"{module}.{name} is a module and a lazy name of {module}")
    return complaints


_IN = "'''A docstring that is long enough.'''\n"
# (rule, a module that breaks it, its text)
PLANTED: list[tuple[Rule, str, str]] = [
    (rooms_import_only_what_lies_below, "vqkit.ops.x", "import vqkit.models.config"),
    (rooms_import_only_what_lies_below, "vqkit.ops.x", "from vqkit import models"),
    (rooms_import_only_what_lies_below, "vqkit.ops.x", "def f():\n    from vqkit.config import to_dict"),
    (rooms_import_only_what_lies_below, "vqkit.train.x", "from vqkit.generate import load"),
    (rooms_import_only_what_lies_below, "vqkit.generate.x", "from vqkit.train.config import RunConfig"),
    (rooms_import_only_what_lies_below, "vqkit.recipes.x", "from vqkit.models.transformer import TransformerVQ"),
    (rooms_import_only_what_lies_below, "vqkit.data.x", "from vqkit.ops import codebook"),
    (rooms_import_only_what_lies_below, "vqkit.models.x", "from vqkit import nearest_code"),
    (rooms_import_only_what_lies_below, "vqkit.train.x", "from vqkit.compat import load_official"),
    (rooms_import_only_what_lies_below, "vqkit.compat.x", "from vqkit.cli import main"),
    (rooms_import_only_what_lies_below, "vqkit.config", "from vqkit.files import write_text_atomic"),
    (every_module_is_in_a_known_room, "vqkit.extras", ""),
    (foreign_packages_stay_where_they_belong, "vqkit.train.x", "import rich"),
    (foreign_packages_stay_where_they_belong, "vqkit.ops.x", "def f():\n    import pandas"),
    (foreign_packages_stay_where_they_belong, "vqkit.ops.x", "import triton.language as tl"),
    (foreign_packages_stay_where_they_belong, "vqkit.train.x", "from matplotlib import pyplot"),
    (foreign_packages_stay_where_they_belong, "vqkit.models.x", "def f():\n    import msgpack"),
    (foreign_packages_stay_where_they_belong, "vqkit.compat.x", "import msgpack"),
    (torch_free_modules_reach_no_torch, "vqkit.data.config", "import torch"),
    (torch_free_modules_reach_no_torch, "vqkit.data.config", "import numpy as np"),
    (torch_free_modules_reach_no_torch, "vqkit.recipes.x", "from vqkit.models.transformer import TransformerVQ"),
    (torch_free_modules_reach_no_torch, "vqkit.cli", "from torch import Tensor"),
    (torch_free_modules_reach_no_torch, "vqkit.data", "from vqkit.data.batches import Batch"),
    (collectives_stay_in_dist_and_train, "vqkit.ops.x", "import torch.distributed as d"),
    (collectives_stay_in_dist_and_train, "vqkit.models.x", "from torch import distributed"),
    (collectives_stay_in_dist_and_train, "vqkit.quantizers.x", "import torch\ndef f():\n    torch.distributed.barrier()"),
    (printing_and_parsing_stay_in_the_command_line, "vqkit.train.x", "print(1)"),
    (printing_and_parsing_stay_in_the_command_line, "vqkit.train.x", "import sys\nsys.stdout.write('')"),
    (printing_and_parsing_stay_in_the_command_line, "vqkit.data.x", "from argparse import ArgumentParser"),
    (checks_are_no_asserts, "vqkit.cli.x", "def f(x):\n    assert x"),
    (nothing_is_pickled, "vqkit.train.x", "import pickle"),
    (nothing_is_pickled, "vqkit.train.x", "import torch\ntorch.load('x')"),
    (nothing_is_pickled, "vqkit.data.x", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (importing_does_nothing, "vqkit.models.x", "import torch\ntorch.manual_seed(0)"),
    (importing_does_nothing, "vqkit.models.x", "import torch\nclass A:\n    on = torch.cuda.is_available()"),
    (names_follow_the_house, "vqkit.ops.utils", _IN),
    (names_follow_the_house, "vqkit.ops.x", _IN + "def get_codes(): ..."),
    (names_follow_the_house, "vqkit.ops.x", "'''.'''"),
    (names_follow_the_house, "vqkit.ops.x", _IN + "# \u00e9"),
    (functions_are_not_called_like_their_module, "vqkit.ops", "_MODULES = {'codebook': 'codebook'}"),
]
RULES: list[Rule] = list(dict.fromkeys(rule for rule, _, _ in PLANTED))


@cache
def complaints_now(rule: Rule) -> list[str]:
    return rule(sources())


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_the_house_keeps_its_rules(rule: Rule) -> None:
    complaints = complaints_now(rule)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("rule", "module", "text"), PLANTED, ids=[f"{r.__name__}-{i}" for i, (r, _, _) in enumerate(PLANTED)])
def test_a_planted_fault_is_seen(rule: Rule, module: str, text: str) -> None:
    before = set(complaints_now(rule))
    planted = {**sources(), module: text}
    assert any(module in complaint for complaint in set(rule(planted)) - before)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vqkit.ops.x", _IN + "def f():\n    import triton"),
        ("vqkit.ops.x", _IN + "from vqkit.dist import Reducer"),
        ("vqkit.data.config", _IN + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy as np"),
        ("vqkit.cli.x", _IN + "def f():\n    import torch\n    from vqkit.train import train\n    print(1)"),
        ("vqkit.train.x", _IN + "import torch.distributed\nfrom vqkit import __version__"),
        ("vqkit.recipes.x", _IN + "from vqkit.train.config import RunConfig"),
    ],
)
def test_what_is_allowed_is_not_complained_about(module: str, text: str) -> None:
    for rule in RULES:
        assert rule({**sources(), module: text}) == complaints_now(rule)


def test_every_room_stands_and_is_in_the_design() -> None:
    design = (SOURCE.parent / "docs" / "design.md").read_text()
    built = {room(m) for m in sources()} - {""}
    assert built == set(ROOMS)
    for name in built - {"__main__"}:
        assert f"| `{name}/` |" in design or f"| `{name}.py` |" in design, f"docs/design.md has no line for {name}"
