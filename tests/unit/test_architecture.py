"""House rules a machine can check: who imports whom, how long things are, what is never called."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest
from paths import ROOT
from written_keys import written_keys

from hourglass_dist.config.loader import paths, read_yaml
from hourglass_dist.config.schema import Config

PACKAGES = ("hourglass_dist", "data_tools")

# A file imports files above it, never one below. A new file is given its place here.
ORDER = [
    *(
        "config.loader",
        "config.describe",
        "config.shipped",
        "config.data",
        "model.settings",
        "config.model",
        "config.schema",
        "core.files",
        "core.records",
        "health.heartbeat",
        "health.watcher",
        "core.ranks",
    ),
    *("data.tokenizer", "data.shards", "data.write", "data.data_plan", "data.order"),
    *("data.remote", "data.mixture", "data.stream", "data.held_out"),
    *("model.layout", "model.attention", "model.linear", "model.norms"),
    *(
        "model.pool",
        "model.cache",
        "model.layers",
        "model.resample",
        "model.checkpointing",
        "model.head",
        "model.hourglass",
        "model.decode",
    ),
    *(
        "planning.cost_units",
        "planning.cost_parts",
        "planning.cost",
        "model.lucidrains",
        "engine.muon",
        "engine.optim",
        "report.diagram",
        "planning.devices",
        "planning.plan",
        "engine.deepspeed_config",
        "engine.sharded_state",
        "engine.loss_scale",
        "engine.offload",
        "engine.engine",
        "checkpoint.remote",
        "checkpoint.save",
        "inference.export",
        "inference.score",
        "inference.generate",
        "inference.api",
        "training.samples",
    ),
    *(
        "checkpoint.tools",
        "core.stop",
        "health.history",
        "health.rank_checks",
        "training.level_stats",
        "training.throughput",
        "training.writers",
        "health.stragglers",
        "training.metrics",
        "training.evaluation",
        "training.guards",
        "training.profile_table",
        "training.profiler",
        "train",
        "preflight",
    ),
    "report.status",
    *("planning.failures", "planning.collective_times", "planning.forecast"),
    *("report.charts", "report.report_style", "report.page"),
    *("bench.shared", "bench.model", "bench.decode", "bench.compare", "bench.data", "bench.save"),
    *("bench.zero_worker", "bench.zero", "bench.loop_worker", "bench.loop"),
    *("bench.store", "bench.traffic_worker", "bench.scale", "bench.cli"),
    *("launch.rendezvous", "launch.agent", "launch.hostfile", "launch.ssh"),
    *("launch.cluster", "launch.kubernetes", "launch.targets"),
    "cli",
]
FOR_DATA_TOOLS = ("data", "config", "core")
LONGEST_FUNCTION = 60
LONGEST_FILE = 450


def modules() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name; ``__init__`` files are empty, left out."""
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        if path == ROOT / "hourglass_dist/__init__.py":
            continue  # the Python API, which names parts of all rooms
        if path.name == "__init__.py":
            assert not path.read_text().strip(), f"{path}: expected an empty file"
        else:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[str]:
    """All names imported, also inside functions; of ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.Module) -> set[str]:
    return {name for name in imports(tree) if name in MODULES}


def forbidden(tree: ast.Module) -> list[str]:
    """What could run foreign code: pickles, eval, exec, a shell, an unsafe torch.load."""
    found = [
        f"import {name}"
        for name in imports(tree)
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


def test_every_file_has_its_place() -> None:
    there = {name for name in MODULES if name.startswith("hourglass_dist.")}
    assert there == {f"hourglass_dist.{name}" for name in ORDER}


def test_imports_point_only_up() -> None:
    place = {f"hourglass_dist.{name}": index for index, name in enumerate(ORDER)}
    wrong = [
        f"{name} imports {other}"
        for name, tree in MODULES.items()
        for other in own_imports(tree)
        if name in place and other in place and place[other] >= place[name]
    ]
    assert not wrong


def test_there_are_no_cycles() -> None:
    TopologicalSorter({name: own_imports(tree) for name, tree in MODULES.items()}).prepare()


def test_only_the_engine_knows_deepspeed() -> None:
    importers = {
        name
        for name, tree in MODULES.items()
        if any(other.partition(".")[0] == "deepspeed" for other in imports(tree))
    }
    assert importers == {"hourglass_dist.engine.engine"}


def test_only_the_command_line_knows_data_tools() -> None:
    importers = {
        name
        for name, tree in MODULES.items()
        if name.startswith("hourglass_dist.")
        and any(other.startswith("data_tools") for other in imports(tree))
    }
    assert importers == {"hourglass_dist.cli"}


def test_data_tools_knows_only_the_data_side() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in MODULES.items()
        if name.startswith("data_tools.")
        for other in own_imports(tree)
        if other.startswith("hourglass_dist.") and other.split(".")[1] not in FOR_DATA_TOOLS
    ]
    assert not wrong


def test_model_and_data_do_not_know_each_other() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in MODULES.items()
        for other in own_imports(tree)
        if {name.split(".")[1], other.split(".")[1]} == {"model", "data"}
    ]
    assert not wrong


def test_the_model_knows_torch_and_einops_only() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "einops"}
    wrong = [
        f"{name} imports {other}"
        for name, tree in MODULES.items()
        for other in imports(tree)
        if name.startswith("hourglass_dist.model.")
        and not other.startswith("hourglass_dist.model.")
        and other.partition(".")[0] not in allowed
    ]
    assert not wrong


def test_nothing_is_long() -> None:
    functions = [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    files = {
        str(path): len(path.read_text().splitlines())
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert not functions
    assert not {path: lines for path, lines in files.items() if lines > LONGEST_FILE}


def test_nothing_runs_foreign_code() -> None:
    assert not {name: bad for name, tree in MODULES.items() if (bad := forbidden(tree))}


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
