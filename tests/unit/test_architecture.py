"""House rules a machine can check: who imports whom, how long things are, what is never called.

``python -m tests.measure.house`` prints the figures.
"""

from __future__ import annotations

import ast
import sys

import pytest
from house import TRUSTED, Graph, cycles, imported, room_of
from paths import ROOT
from written_keys import written_keys

from hourglass_dist.config.loader import paths, read_yaml
from hourglass_dist.config.schema import Config

LAYERS = [
    {"core", "model", "config", "pages"},
    {"data", "engine"},
    {"checkpoint", "planning", "data_tools"},
    {"inference", "health"},
    {"report", "launch", "preflight"},
    {"training"},
    {"train"},
    {"bench"},
    {"cli", "hourglass_dist"},
]
"""A room imports rooms of its own layer and of those before it; a new room is given its place."""

EXCEPTIONS: set[tuple[str, str]] = set()
"""(room, a room it imports against the rules): to be removed."""

LONGEST_FUNCTION, LONGEST_FILE, FULLEST_FOLDER = 60, 450, 15
LINES_TO_TRUST_A_RUN, LINES = 9_400, 24_200

HOUSE = Graph(ROOT)
ROOMS = HOUSE.rooms()


def forbidden(tree: ast.Module) -> list[str]:
    """What could run foreign code: pickles, eval, exec, a shell, an unsafe torch.load."""
    found = [
        f"import {name}"
        for name in imported(tree)
        if name.partition(".")[0] in ("pickle", "cPickle", "dill", "shelve", "marshal")
    ]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        name = ast.unparse(call.func)
        if (
            name in ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load")
            or (name == "torch.load" and given.get("weights_only") != "True")
            or given.get("shell", "False") != "False"
            or given.get("allow_pickle", "False") != "False"
        ):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def importers(package: str) -> set[str]:
    """The rooms that import ``package``."""
    return {
        room_of(name)
        for name, module in HOUSE.modules.items()
        if any(other.partition(".")[0] == package for other in imported(module.tree))
    }


def test_every_room_has_its_place() -> None:
    assert set(ROOMS) == set.union(*LAYERS)


def test_a_room_says_nothing_by_itself() -> None:
    files = {name: m for name, m in HOUSE.modules.items() if m.path.name == "__init__.py"}
    assert {name for name, module in files.items() if module.lines} <= {"hourglass_dist"}


def test_imports_point_one_way() -> None:
    layer = {room: index for index, rooms in enumerate(LAYERS) for room in rooms}
    upward = {(a, b) for a, others in ROOMS.items() for b in others if layer[b] > layer[a]}
    assert upward == EXCEPTIONS


def test_there_are_no_cycles() -> None:
    assert not cycles({name: HOUSE.imports(name) for name in HOUSE.modules})
    rooms = {a: {b for b in others if (a, b) not in EXCEPTIONS} for a, others in ROOMS.items()}
    assert not cycles(rooms)


def test_only_the_engine_knows_deepspeed() -> None:
    assert importers("deepspeed") == {"engine"}


def test_the_model_knows_torch_and_einops_only() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "einops"}
    for name in HOUSE.modules_of("model"):
        others = imported(HOUSE.modules[name].tree)
        outside = {other for other in others if not other.startswith("hourglass_dist.model")}
        assert {other.partition(".")[0] for other in outside} <= allowed, name


def test_the_data_tools_and_the_command_line_alone_know_one_another() -> None:
    assert importers("data_tools") == {"data_tools", "cli"}
    assert ROOMS["data_tools"] <= {"config", "core", "data", "pages"}


def test_model_and_data_do_not_know_each_other() -> None:
    assert "data" not in ROOMS["model"]
    assert "model" not in ROOMS["data"]


def test_nothing_is_long() -> None:
    assert not [(lines, name) for lines, name in HOUSE.functions() if lines > LONGEST_FUNCTION]
    files = {name: module.lines for name, module in HOUSE.modules.items()}
    assert not {name: lines for name, lines in files.items() if lines > LONGEST_FILE}
    folders = HOUSE.files_by_folder()
    assert not {name: files for name, files in folders.items() if files > FULLEST_FOLDER}


def test_the_whole_is_not_long() -> None:
    assert HOUSE.lines(TRUSTED) <= LINES_TO_TRUST_A_RUN
    assert sum(module.lines for module in HOUSE.modules.values()) <= LINES


def test_nothing_runs_foreign_code() -> None:
    assert not {
        name: bad for name, module in HOUSE.modules.items() if (bad := forbidden(module.tree))
    }


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run(command, shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_sees_foreign_code(source: str) -> None:
    assert forbidden(ast.parse(source))


def test_the_check_lets_safe_code_pass() -> None:
    source = "model.eval()\nsubprocess.run(c)\ntorch.load(p, weights_only=True)\nnp.load(p)"
    assert not forbidden(ast.parse(source))


def test_every_option_is_used_by_a_settings_file() -> None:
    schema = {path for path, _ in paths(Config)}
    used = {
        key
        for file in (ROOT / "configs").glob("*.yaml")
        for key in written_keys(read_yaml(file), schema)
    }
    assert not schema - used
