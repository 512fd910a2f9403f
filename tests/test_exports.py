# SPDX-License-Identifier: Apache-2.0
"""What can be imported from ``chainmerge``, and the examples of the documentation that do so."""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import chainmerge
from chainmerge import Interrupted, MergeOutcome, MergeReport, Stage
from tests.support.cli import environment
from tests.support.disks_vm import running_disks_of
from tests.support.domain_vm import TARGET, running_domain
from tests.support.images import MIB
from tests.support.libvirtd import libvirtd
from tests.support.live_vm import DEVICE, running_vm
from tests.support.qemu import content, create, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = ROOT / "src" / "chainmerge"
_EXAMPLE: Final = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def classes_in(file: Path) -> Iterator[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def examples_in(page: str) -> list[str]:
    return _EXAMPLE.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A base, two snapshots and the image that the guest writes to, with data in each."""
    chain = [create(tmp_path / "base.qcow2", 8 * MIB)]
    for name in ("snap1.qcow2", "snap2.qcow2", "active.qcow2"):
        chain.append(create(tmp_path / name, backing=chain[-1]))
    for number, image in enumerate(chain, start=1):
        qemu_io(image, f"write -P {number} {number}M 1M")
    return chain


def run_example(example: str, images: list[Path], *said_instead: tuple[str, str]) -> str:
    """What an example prints, run as it is printed but for where images and VMs are."""
    for said, here in (("/images", str(images[0].parent)), *said_instead):
        assert said in example
        example = example.replace(said, here)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


# The API reads no configuration, and keeps no log.
OF_COMMANDS_ALONE: Final = {
    PACKAGE / "documents" / "configuration.py",
    PACKAGE / "documents" / "log.py",
}


def test_all_that_callers_meet_can_be_imported_from_the_package() -> None:
    documents = {*(PACKAGE / "documents").glob("*.py")} - OF_COMMANDS_ALONE
    homes = (PACKAGE / "errors.py", *sorted(documents))
    met = {name for file in homes for name in classes_in(file)}
    assert len(met) > 50
    assert met - set(chainmerge.__all__) == set()


@pytest.mark.parametrize("name", chainmerge.__all__)
def test_each_name_is_there(name: str) -> None:
    found = getattr(chainmerge, name)
    assert name == "__version__" or found.__module__.startswith(("chainmerge.", "collections"))


def test_the_package_lists_its_names() -> None:
    assert set(dir(chainmerge)) >= set(chainmerge.__all__)


def test_importing_it_loads_nothing_else() -> None:
    script = (
        "import sys, chainmerge; dir(chainmerge);"
        "print(sorted(name for name in sys.modules if name.startswith('chainmerge')))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, env=environment()
    ).stdout
    assert out.decode().strip() == "['chainmerge', 'chainmerge.__about__']"


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        chainmerge.frobnicate  # noqa: B018


def test_the_example_of_the_readme(images: list[Path]) -> None:
    (example,) = examples_in("README.md")
    expected = content(images[-1])
    lines = run_example(example, images).splitlines()
    assert f"{Stage.COPY} {MIB} {MIB}" in lines
    assert lines[-1] == f"merged ('{images[1]}',)"
    assert not images[1].exists()
    assert content(images[-1]) == expected


def test_the_example_of_the_readme_can_be_stopped(images: list[Path]) -> None:
    (example,) = examples_in("README.md")
    installed = "signal.signal("
    stop = f"import os; os.kill(os.getpid(), {int(signal.SIGTERM)})\ntry:"
    said = run_example(example, images, ("try:", stop))
    assert installed in example
    assert said.splitlines()[-1].startswith("interrupted ")
    assert images[1].exists()


def test_the_example_of_a_merge(images: list[Path]) -> None:
    example, *_ = examples_in("docs/api.md")
    lines = run_example(example, images).splitlines()
    stages = {line.split()[0] for line in lines}
    assert {Stage.COPY, Stage.READ_BACK} <= stages
    assert not images[1].exists()


def test_the_example_of_a_running_vm(images: list[Path], tmp_path: Path) -> None:
    _, example, *_ = examples_in("docs/api.md")
    with running_vm(tmp_path / "vm", images) as vm:
        run_example(example, images, ("/run/vm7/qmp", str(vm.qmp)), ("disk0", DEVICE))
        assert vm.chain() == ["active.qcow2", "snap2.qcow2", "base.qcow2"]
    assert not images[1].exists()


def test_the_example_of_a_domain(images: list[Path], tmp_path: Path) -> None:
    _, _, example, _ = examples_in("docs/api.md")
    with (
        libvirtd(tmp_path / "libvirt") as uri,
        running_domain(tmp_path / "vm", uri, images) as domain,
    ):
        disk = ('"web", "vda"', f'"{domain.name}", "{TARGET}", uri="{uri}"')
        run_example(example, images, disk)
        assert domain.chain() == ["active.qcow2", "snap1.qcow2", "base.qcow2"]
    assert not images[2].exists()


def test_the_example_of_several_disks(tmp_path: Path) -> None:
    *_, example = examples_in("docs/api.md")
    chains = []
    for name in ("vda", "vdb"):
        chain = [create(tmp_path / f"{name}.qcow2", 8 * MIB)]
        for level in ("snap1", "snap2"):
            chain.append(create(tmp_path / f"{name}-{level}.qcow2", backing=chain[-1]))
        chains.append(chain)
    with running_disks_of(tmp_path / "vm", chains) as (vm, disks):
        run_example(example, chains[0], ("/run/vm7/qmp", str(vm.qmp)))
        assert [disk.chain() for disk in disks] == [["vda.qcow2"], ["vdb.qcow2"]]


def test_callers_catch_by_the_package(images: list[Path]) -> None:
    with pytest.raises(Interrupted):
        chainmerge.merge(images[1], should_stop=lambda: True)
    report: MergeReport = chainmerge.merge(images[1])
    assert report.outcome is MergeOutcome.MERGED
