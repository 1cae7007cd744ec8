"""The rooms of functrain: what may import what, and how large a file, a class and a function may be."""

import ast
import graphlib
import io
import pathlib
import tokenize

import pytest

import functrain

HOUSE = pathlib.Path(functrain.__file__).parent

# From the ground up. Of the loop's files those are its ground that import nothing of it, as every.py.
FLOORS = [
    {"errors"}, {"tree"}, {"gradients", "optim"}, {"update"}, {"auditing"}, {"loop's ground"}, {"loop/checkpoint"},
    {"loop"}, {"__init__"},
]  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OPTIONAL = {"flax", "grain", "orbax", "tensorboardX", "tensorflow_datasets", "tqdm"}

FILE, CLASS, FUNCTION = 350, 250, 50  # A function's are the lines of code in its body, the others are lines.


def read(house):
    """The text of each file, by the parts of its module's name."""
    return {path.relative_to(house.parent).with_suffix("").parts: path.read_text() for path in house.rglob("*.py")}


def imported(module, nodes):
    """What the import statements among these nodes name, as parts."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = module[: -node.level] if node.level else ()
            start += tuple(node.module.split(".")) if node.module else ()
            yield from ((*start, alias.name) for alias in node.names)


def at_once(tree):
    """The nodes that run when the module is imported: not those of functions, nor those for types."""
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_once(node)


def faults(house):
    """What in the imports of a house is not as it should be."""
    trees = {module: ast.parse(text) for module, text in sorted(read(house).items())}

    def resolved(name):
        """The file that a name is in, or is."""
        ends = range(len(name), 0, -1)
        return next((one for end in ends for one in (name[:end], (*name[:end], "__init__")) if one in trees), None)

    arrows = {module: {resolved(name) for name in imported(module, ast.walk(tree))} - {None}
              for module, tree in trees.items()}  # fmt: skip

    def room(module):
        found = "/".join(module[1:-1]) or module[-1]
        is_ground = found == "loop" and not any(other[1] == "loop" for other in arrows[module])
        return "loop's ground" if is_ground else found

    for module, tree in trees.items():
        name, here = "/".join(module), room(module)
        if here not in FLOOR:
            yield f"{name} is in no room"
            continue
        for other in sorted(arrows[module]):
            if room(other) != here and FLOOR.get(room(other), len(FLOORS)) >= FLOOR[here]:
                yield f"{name} imports {'/'.join(other)}, which is not below it"
        for names in imported(module, at_once(tree)):
            if names[0] in OPTIONAL:
                yield f"{name} imports {names[0]} before it is used"
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        yield "a circle: " + ", ".join("/".join(module) for module in error.args[1])


def code_lines(text):
    """The numbers of the lines that hold code: no blank lines, no comments, no docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    docs = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]  # fmt: skip
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return lines - {line for node in docs for line in range(node.lineno, node.end_lineno + 1)}


def too_large(house):
    for module, text in sorted(read(house).items()):
        name, code, length = "/".join(module), code_lines(text), len(text.splitlines())
        if length > FILE:
            yield f"{name}: {length} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and (length := node.end_lineno - node.lineno + 1) > CLASS:
                yield f"{name}: class {node.name}, {length} lines"
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = len(code & set(range(node.body[0].lineno, node.end_lineno + 1)))
                if length > FUNCTION:
                    yield f"{name}: {node.name}(), {length} lines of code"


def test_files_import_what_is_below_them_and_nothing_in_a_circle():
    assert list(faults(HOUSE)) == []


def test_no_file_class_or_function_is_too_large():
    assert list(too_large(HOUSE)) == []


SOUND = {
    "__init__.py": "import functrain.loop", "errors.py": "", "tree/paths.py": "from functrain import errors",
    "optim/optimizer.py": "from functrain.tree.paths import flatten", "gradients/loss.py": "import optax",
    "update/update.py": "from ..optim import optimizer", "auditing/audit.py": "import functrain.update.update",
    "loop/__init__.py": "from . import fit", "loop/every.py": "from functrain.auditing import audit",
    "loop/fit.py": "from functrain.loop.every import Every\nfrom .checkpoint.folder import Folder",
    "loop/checkpoint/folder.py": "from functrain.loop import every\ndef f():\n    import orbax.checkpoint as ocp",
}  # fmt: skip
TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
UP = "{}, which is not below it".format


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, []),
        ({"gradients/reach.py": "from . import loss", "loop/data.py": TYPING + "import grain"}, []),
        ({"tree/up.py": "from functrain.optim.optimizer import x"},
         [UP("functrain/tree/up imports functrain/optim/optimizer")]),
        ({"update/up.py": "def f():\n    import functrain.loop.fit"},
         [UP("functrain/update/up imports functrain/loop/fit")]),
        ({"gradients/up.py": "from ..optim import optimizer"},
         [UP("functrain/gradients/up imports functrain/optim/optimizer")]),
        ({"auditing/up.py": TYPING + "from functrain.loop import every"},
         [UP("functrain/auditing/up imports functrain/loop/every")]),
        ({"loop/checkpoint/up.py": "from functrain.loop.fit import fit"},
         [UP("functrain/loop/checkpoint/up imports functrain/loop/fit")]),
        ({"tree/up.py": "import functrain as ft"}, [UP("functrain/tree/up imports functrain/__init__")]),
        ({"optim/a.py": "from functrain.optim.b import x", "optim/b.py": TYPING + "from .a import y"},
         ["a circle: functrain/optim/a, functrain/optim/b, functrain/optim/a"]),
        ({"loop/logs.py": "try:\n    import tqdm.auto\nexcept ImportError:\n    tqdm = None"},
         ["functrain/loop/logs imports tqdm before it is used"]),
        ({"step.py": ""}, ["functrain/step is in no room"]),
    ],
)  # fmt: skip
def test_what_is_imported_from_above_or_in_a_circle_is_told(tmp_path, files, told):
    for name, text in (SOUND | files).items():
        path = tmp_path / "functrain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert list(faults(tmp_path / "functrain")) == told


@pytest.mark.parametrize("more", [0, 1])
def test_what_is_too_large_is_told(tmp_path, more):
    path = tmp_path / "functrain" / "a.py"
    path.parent.mkdir()
    body = '    """One.\n\n    Two.\n    """\n' + "    # Three.\n\n" + "    x = 1\n" * (FUNCTION + more)
    large = "class Large:\n" + "    x = 1\n" * (CLASS - 1 + more)
    text = f"def long(a,\n         b):\n{body}" + large
    path.write_text(text + "x = 1\n" * (FILE + more - len(text.splitlines())))
    told = [f"functrain/a: {FILE + 1} lines", f"functrain/a: long(), {FUNCTION + 1} lines of code",
            f"functrain/a: class Large, {CLASS + 1} lines"]  # fmt: skip
    assert list(too_large(tmp_path / "functrain")) == told * more
