# SPDX-License-Identifier: Apache-2.0
"""The order of the house: what lies where, how large it is, and that a name has one home.

What does not keep to it today stands in lists that may only become shorter: a test fails for what
is new, and for what is on a list without need.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = ROOT / "src" / "chainmerge"
TESTS: Final = ROOT / "tests"

MODULES_AT_THE_TOP: Final = {
    "__init__",
    "__main__",
    "__about__",
    "api",
    "catalogue",
    "errors",
    "options",
}
MOST_LINES_OF_A_FILE: Final = 600
MOST_LINES_OF_THE_MEDIAN_FILE: Final = 150
MOST_LINES_OF_A_FUNCTION: Final = 60

LONG_FUNCTIONS: Final[set[str]] = set()
LONG_TEST_FILES: Final = {"lifecycle/life.py"}
UNTESTED_PACKAGES: Final = {"cli/fleet", "live/libvirt", "live/qmp"}
"""Packages whose tests lie in the directory above, those of `cli/fleet` in `fleet`."""

SHARED_NAMES: Final = {
    # A command of the program has the name of the function that it calls.
    "check": {"cli/check.py", "cli/config.py", "qcow2/check.py"},
    "explain": {"catalogue.py", "cli/explain.py"},
    "flatten": {"cli/flatten.py", "merging/flattening.py"},
    "list_chains": {"cli/list_chains.py", "inventory/overview.py"},
    "main": {"cli/main.py", "report/schema.py"},
    "measure": {"cli/measure.py", "planning/dry_run.py"},
    "merge": {
        "cli/bitmaps.py",
        "cli/live.py",
        "cli/merge.py",
        "live/__init__.py",
        "live/merging.py",
        "merging/merge.py",
    },
    "merge_disks": {"live/__init__.py", "live/disks.py", "merging/disks.py"},
    "plan_disks": {"live/__init__.py", "live/disks.py", "merging/disks.py"},
    "merge_all_disks": {"live/__init__.py", "live/whole_vm.py"},
    "plan_all_disks": {"live/__init__.py", "live/whole_vm.py"},
    "cancel": {
        "cli/cancel.py",
        "cli/fleet/commands.py",
        "fleet/engine.py",
        "fleet/operating.py",
        "repairing/cancelling.py",
    },
    "plan": {
        "cli/fleet/plan.py",
        "cli/live.py",
        "cli/plan.py",
        "live/__init__.py",
        "live/merging.py",
        "planning/dry_run.py",
    },
    "prune": {"bitmaps/pruning.py", "cli/bitmaps.py"},
    "relink": {"cli/relink.py", "repairing/relinking.py"},
    "plan_repair": {"live/__init__.py", "live/qmp/repairing.py", "repairing/mending.py"},
    "repair": {
        "cli/bitmaps.py",
        "cli/live.py",
        "cli/repair.py",
        "live/__init__.py",
        "live/qmp/repairing.py",
        "repairing/mending.py",
    },
    "scan": {"cli/fleet/scan.py", "cli/scan.py", "inventory/scan.py"},
    "report": {"cli/fleet/report.py", "cli/report.py"},
    "look": {"cli/fleet/scan.py", "fleet/looking.py"},
    "resume": {"cli/live.py", "live/__init__.py", "live/merging.py"},
    "status": {
        "cli/fleet/commands.py",
        "cli/live.py",
        "cli/status.py",
        "fleet/overview.py",
        "live/__init__.py",
        "live/merging.py",
        "records/unfinished.py",
    },
    "thin_out": {"cli/thin_out.py", "inventory/thin_out.py"},
    # Commands of the fleet have the names of what they do, and that of what the queue does for it.
    "submit": {"cli/fleet/commands.py", "fleet/engine.py", "fleet/operating.py"},
    "retry": {"cli/fleet/commands.py", "fleet/engine.py", "fleet/operating.py"},
    "forget": {"cli/fleet/commands.py", "fleet/engine.py", "fleet/operating.py"},
    "results": {"cli/fleet/commands.py", "fleet/overview.py"},
    "pause": {"cli/fleet/commands.py", "fleet/operating.py"},
    "limit": {"cli/fleet/commands.py", "fleet/operating.py"},
    "drain": {"cli/fleet/commands.py", "fleet/operating.py"},
    "undrain": {"cli/fleet/commands.py", "fleet/operating.py"},
    # Variables of types.
    "Function": {"cli/live.py", "cli/options.py", "cli/vm_disks.py"},
    "P": {"cli/live.py", "cli/options.py", "cli/vm_disks.py", "storage/boundary.py"},
    "R": {"cli/live.py", "cli/options.py", "cli/vm_disks.py"},
    "T": {"storage/boundary.py", "storage/transfer/workers.py"},
    # One is a step of the other.
    "reserve": {"engines/metadata/steps.py", "storage/allocation.py"},
}
"""Public names that have more than one home, and which."""


def modules() -> list[Path]:
    found = sorted(SOURCE.rglob("*.py"))
    assert found
    return found


def place(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions_in(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_long(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function has too many lines, from ``def`` on and with its docstring."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1 > MOST_LINES_OF_A_FUNCTION


def public_names(tree: ast.Module) -> Iterator[str]:
    """What a module defines for others: functions, classes and constants."""
    for node in tree.body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = [node.name]
            case ast.Assign():
                names = [one.id for one in node.targets if isinstance(one, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case _:
                names = []
        yield from (name for name in names if not name.startswith("_"))


def homes(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The public names that are defined in several modules, and where."""
    found = defaultdict(set)
    for where, tree in trees.items():
        for name in public_names(tree):
            found[name].add(where)
    return {name: places for name, places in found.items() if len(places) > 1}


def test_only_what_is_for_all_lies_at_the_top() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == MODULES_AT_THE_TOP


def test_no_file_is_too_long() -> None:
    assert [place(path) for path in modules() if line_count(path) > MOST_LINES_OF_A_FILE] == []


def test_most_files_are_short() -> None:
    assert median(map(line_count, modules())) < MOST_LINES_OF_THE_MEDIAN_FILE


def test_no_function_is_too_long() -> None:
    found = {
        f"{place(path)}: {function.name}"
        for path in modules()
        for function in functions_in(ast.parse(path.read_text()))
        if is_long(function)
    }
    assert found - LONG_FUNCTIONS == set(), "too long"
    assert LONG_FUNCTIONS - found == set(), "short enough now: take it off the list"


def test_a_name_has_one_home() -> None:
    found = homes({place(path): ast.parse(path.read_text()) for path in modules()})
    new = {name: places for name, places in found.items() if places - SHARED_NAMES.get(name, set())}
    assert new == {}, "defined elsewhere already: use that, or another name"
    settled = {
        name: places - found.get(name, set())
        for name, places in SHARED_NAMES.items()
        if places - found.get(name, set())
    }
    assert settled == {}, "has one home less: take that off the list"


def test_every_package_has_a_directory_of_tests() -> None:
    packages = {
        path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*/__init__.py")
    }
    without = {name for name in packages if not any((TESTS / name).rglob("test_*.py"))}
    assert without - UNTESTED_PACKAGES == set(), "no tests"
    assert UNTESTED_PACKAGES - without == set(), "has tests now: take it off the list"


def test_no_file_of_tests_is_too_long() -> None:
    found = {
        path.relative_to(TESTS).as_posix()
        for path in TESTS.rglob("*.py")
        if line_count(path) > MOST_LINES_OF_A_FILE
    }
    assert found - LONG_TEST_FILES == set(), "too long"
    assert LONG_TEST_FILES - found == set(), "short enough now: take it off the list"


# Whether the tests above can fail


def test_a_long_function_is_seen_wherever_it_is() -> None:
    body = "\n".join(f"        x = {line}" for line in range(MOST_LINES_OF_A_FUNCTION))
    long = f"class A:\n    async def f(self):\n{body}\n"
    (function,) = functions_in(ast.parse(long))
    assert is_long(function)
    (shorter,) = functions_in(ast.parse(long.replace("        x = 0\n", "")))
    assert not is_long(shorter)


def test_names_are_seen_however_they_are_defined() -> None:
    text = "A = B = 1\nC: int = 2\nD, _E = 3, 4\n_F = 5\ndef g(): h = 6\nclass I:\n    J = 7\n"
    assert list(public_names(ast.parse(text))) == ["A", "B", "C", "g", "I"]


def test_a_second_home_is_seen() -> None:
    trees = {"a.py": ast.parse("def f(): ..."), "b.py": ast.parse("f = 1"), "c.py": ast.parse("")}
    assert homes(trees) == {"f": {"a.py", "b.py"}}
