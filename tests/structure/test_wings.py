"""The house of `python/starflow`: a wing answers one question, its arrows run down, and nothing runs in a circle.

Every import counts, wherever it stands: one inside a function or for type checkers is still knowledge of another wing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "starflow"

# From the ground up: a wing imports the ground and wings that stand before it, no others.
GROUND = (
    "arguments",
    "config",
    "distributed",
    "extras",
    "files",
    "devices",
    "inference",
    "mapped",
    "messages",
    "noise",
    "numeric",
    "schedules",
)
INPUTS = ("codecs", "data", "worlds", "text")
WINGS = ("model", "solver", *INPUTS, "storage", "sampling", "training", "evaluate", "play", "cli")
STOREYS = 10

# What the wings above do not need to know: the first part of a name, and the wings that may import it.
KEPT_FROM = {"torch.distributed": {"ground", "training"}, "starflow_ext.jacobi_solve": {"solver"}}

Graph = dict[str, set[str]]


def name_of(path: Path) -> str:
    """Dotted name of a module; that of a package for its face."""
    return ".".join(("starflow", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FACES = [f"starflow.{wing}" for wing in WINGS]


def wing_of(module: str) -> str:
    """Wing of a module, "ground" for a module of the ground, "top" for the package's own face and `__main__`."""
    part = [*module.split("."), ""][1]
    return part if part in WINGS else "ground" if part in GROUND else "top"


def imported(module: str) -> Iterator[str]:
    """Dotted names of the modules that a module imports, of whatever package."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # `from starflow import noise` names a module, `from starflow.noise import draw` what one holds. A face
                # shows functions only, some of the name of their module: `from starflow.training import plan`.
                face = node.module in FACES and wing_of(whole) != wing_of(module)
                yield whole if node.module == "starflow" or (whole in MODULES and not face) else str(node.module)


IMPORTS: Graph = {module: set(imported(module)) for module in MODULES}
ARROWS: Graph = {
    module: {name for name in names if name.split(".")[0] == "starflow"} for module, names in IMPORTS.items()
}


def levels(graph: Mapping[str, Set[str]]) -> dict[str, int]:
    """Storey of every node, from 1: one above the highest that it stands on."""
    found: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():
        found[node] = 1 + max((found[below] for below in graph.get(node, ())), default=0)
    return found


def test_every_module_has_a_wing() -> None:
    assert {wing_of(module) for module in MODULES} == {"top", "ground", *WINGS}
    assert [module for module in MODULES if wing_of(module) == "top"] == ["starflow", "starflow.__main__"]


def test_arrows_between_wings_run_down() -> None:
    order = ["ground", *WINGS, "top"]
    upward = [
        f"{module} imports {name}"
        for module, names in ARROWS.items()
        for name in sorted(names)
        if order.index(wing_of(name)) > order.index(wing_of(module))
    ]
    assert upward == []


def test_wings_stand_on_few_storeys() -> None:
    graph: Graph = {}
    for module, names in ARROWS.items():
        graph.setdefault(wing_of(module), set()).update({wing_of(name) for name in names} - {wing_of(module)})
    graph.pop("top")
    assert max(levels(graph).values()) <= STOREYS


def test_other_wings_are_imported_by_their_face_and_ones_own_by_modules() -> None:
    faces = {*FACES, *(f"starflow.{name}" for name in GROUND)}
    wrong = []
    for module, names in ARROWS.items():
        for name in sorted(names):
            own = wing_of(name) == wing_of(module) and wing_of(name) != "ground"
            if own == (name in faces):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        levels(ARROWS)
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("face", FACES)
def test_a_face_says_what_it_answers_and_what_it_shows(face: str) -> None:
    tree = ast.parse(MODULES[face].read_text(encoding="utf-8"))
    question, mark, answer = (ast.get_docstring(tree) or "").splitlines()[0].partition("?")
    assert question
    assert mark, f"{face} asks no question"
    assert answer.endswith(".")
    shown = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    assert len(shown) == 1
    names = ast.literal_eval(shown[0])
    assert names == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))


@pytest.mark.parametrize("name", KEPT_FROM)
def test_what_a_wing_need_not_know(name: str) -> None:
    """The model knows no solver (the arrows say the rest), and neither knows of other processes."""
    knowing = {
        wing_of(module) for module, names in IMPORTS.items() if any(f"{n}.".startswith(f"{name}.") for n in names)
    }
    assert knowing <= KEPT_FROM[name]


def test_the_model_knows_no_solver() -> None:
    seen: set[str] = set()
    queue = [module for module in MODULES if wing_of(module) == "model"]
    while queue:
        module = queue.pop()
        seen.add(module)
        queue.extend(ARROWS[module] - seen)
    assert {wing_of(module) for module in seen} <= {"ground", "model"}
