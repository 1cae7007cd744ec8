"""The rooms of functrain: arrows between them go down, nothing is a circle, nothing is too large to read."""

import ast
import functools
import graphlib
import io
import tokenize
from pathlib import Path

import pytest

import functrain

HOUSE = Path(functrain.__file__).parent
FLOORS = [
    "errors",
    "tree",
    "mesh",
    "gradients optim",
    "update",
    "auditing planning",
    "loop",
    "cli",
    "functrain __main__",
]  # From the ground up.
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


@functools.cache
def names_in(text):
    """What a file imports, for types and within functions too."""
    nodes = [*ast.walk(ast.parse(text))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), "a relative import, which this test does not read"
    names = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return names | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def imports(house):
    """`{module: modules that it imports}`."""
    texts = {".".join(("functrain", *path.relative_to(house).with_suffix("").parts)): path.read_text()
             for path in house.rglob("*.py")}  # fmt: skip
    return {
        module: {each for name in names_in(text) for each in (name, name.rpartition(".")[0], f"{name}.__init__")
                 if each in texts and each != module}
        for module, text in texts.items()
    }  # fmt: skip


def of(module, *floors):
    """Whether a module is of one of the floors within the loop."""
    return any(module.startswith(f"functrain.loop.{floor}.") for floor in floors)


def faults(house):
    arrows = imports(house)
    room = {module: "functrain" if module == "functrain.__init__" else module.split(".")[1] for module in arrows}
    for module, others in arrows.items():
        for other in sorted(others):
            if room[module] != room[other] and FLOOR[room[module]] <= FLOOR[room[other]]:
                yield f"{module} imports {other}, which is not below it"
            if "loop.checkpoint" in module and room[other] == "loop" and not of(other, "checkpoint", "remote") and (
                arrows[other] & {each for each in arrows if room[each] == "loop"}
            ):  # fmt: skip
                yield f"{module} imports {other}, which stands on others of the loop"
            if of(module, "remote") and room[other] == "loop" and not of(other, "remote"):
                yield f"{module} imports {other}, which is above it in the loop"
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as circle:
        yield f"a circle: {', '.join(circle.args[1])}"


def test_arrows_go_down_and_nothing_is_a_circle():
    assert not list(faults(HOUSE))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tree/paths.py", "from functrain.optim.optimizer import Optimizer"),  # Upwards,
        ("optim/states.py", "from functrain.gradients import loss"),  # to a room beside it,
        ("update/step.py", "def late():\n    import functrain.loop.fit"),  # from the core to the loop,
        ("loop/fit.py", "from functrain.cli import main"),  # from the loop to what reads its files,
        ("loop/run.py", "if TYPE_CHECKING:\n    from functrain.loop.hooks import Hook"),  # in a circle, for types,
        ("loop/checkpoint/folder.py", "from functrain.loop.reader import Reader"),  # to the rest of the loop,
        ("loop/remote/store.py", "from functrain.loop.checkpoint.folder import Folder"),  # or to a floor above.
    ],
)
def test_an_arrow_that_is_turned_round_is_found(tmp_path, module, line):
    for path in HOUSE.rglob("*.py"):
        copy = tmp_path / path.relative_to(HOUSE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text() + ("" if str(copy.relative_to(tmp_path)) != module else f"\n{line}\n"))
    assert list(faults(tmp_path))


def code_lines(text):
    """The numbers of the lines that hold code: no blank line, no comment, no docstring."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    docs = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]  # fmt: skip
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return lines - {line for node in docs for line in range(node.lineno, node.end_lineno + 1)}


@pytest.mark.parametrize("path", sorted(HOUSE.rglob("*.py")), ids=lambda path: str(path.relative_to(HOUSE)))
def test_a_file_a_class_and_a_function_can_be_read_in_one_sitting(path):
    text = path.read_text()
    code = code_lines(text)
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 250, node.name
        if isinstance(node, ast.FunctionDef):
            assert len(code & {*range(node.lineno, node.end_lineno + 1)}) <= 50, node.name
