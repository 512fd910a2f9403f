# SPDX-License-Identifier: Apache-2.0
"""The packages for Debian, on a machine that has just been installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from chainmerge import __version__
from tests.packages.conftest import one
from tests.support.clean_root import CleanRoot, clean_root
from tests.support.merge_elsewhere import MIB, assert_merges, build_pair
from tests.support.qemu import qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from release.debian import Debian

BASH_COMPLETES: Final = """\
. /usr/share/bash-completion/bash_completion
_comp_load chainmerge 2>/dev/null || _completion_loader chainmerge
COMP_LINE="chainmerge thin" COMP_POINT=15 COMP_WORDS=(chainmerge thin) COMP_CWORD=1
asked=$(complete -p chainmerge) && asked=${asked##*-F } && ${asked% *} chainmerge
echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def deb(dist: Path, debian: Debian) -> Path:
    return one(dist, f"chainmerge_*~deb{debian.number}_*.deb")


@pytest.fixture(scope="module")
def machine(
    debian: Debian, deb: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CleanRoot]:
    """A new machine, on which nothing was done but to install the package."""
    with clean_root(debian.codename, tmp_path_factory.mktemp("debian") / "root") as root:
        root.do(f"apt-get -y install {root.receive(deb)}")
        yield root


def test_version(machine: CleanRoot) -> None:
    assert machine.do("chainmerge --version") == f"chainmerge {__version__}\n"


def test_a_merge(machine: CleanRoot) -> None:
    assert_merges(machine, "chainmerge")


def test_nothing_is_compiled_later(machine: CleanRoot) -> None:
    before = machine.everything()
    machine.do("chainmerge version && chainmerge --help && chainmerge explain image-locked")
    assert machine.everything() == before
    uncompiled = machine.do(
        "cd /opt/chainmerge/lib/python3*/site-packages/chainmerge &&"
        " find -name '*.py' | while read -r source; do"
        " set -- $(dirname $source)/__pycache__/$(basename $source .py).*.pyc; [ -e $1 ] ||"
        " echo $source; done"
    )
    assert uncompiled == ""


def test_what_python_is_told_elsewhere_is_not_heard(machine: CleanRoot) -> None:
    machine.do("mkdir -p /tmp/other/chainmerge && echo 1/0 >/tmp/other/chainmerge/__init__.py")
    machine.do(
        "PYTHONPATH=/tmp/other chainmerge --version && cd /tmp/other && chainmerge --version"
    )


def test_manual_pages(machine: CleanRoot) -> None:
    if not (machine.path / "usr/share/man/man1/chainmerge.1.gz").exists():
        pytest.skip("no manual pages were there when the packages were made")
    assert "chainmerge merge" in machine.do("MANWIDTH=80 man chainmerge-merge")
    assert "image-locked" in machine.do("MANWIDTH=80 man chainmerge-errors")


def test_bash_completes(machine: CleanRoot) -> None:
    (machine.path / "tmp/completes").write_text(BASH_COMPLETES)
    assert machine.do("bash --norc /tmp/completes").strip() == "thin-out"


def test_zsh_knows_the_completion(machine: CleanRoot) -> None:
    known = "autoload -U compinit && compinit -u -D && print $_comps[chainmerge]"
    assert machine.do(f"zsh -f -c '{known}'").strip() == "_chainmerge"


def test_fish_completes(machine: CleanRoot) -> None:
    assert machine.do("fish -c \"complete -C 'chainmerge thin'\"").split() == ["thin-out"]


def test_metrics_need_nothing_more(machine: CleanRoot) -> None:
    machine.do("chainmerge scan /srv --no-history --textfile /tmp/scan.prom")
    assert "\nchainmerge_" in (machine.path / "tmp/scan.prom").read_text()


def test_libvirt_is_that_of_debian(machine: CleanRoot) -> None:
    imported = "/opt/chainmerge/bin/python3 -I -c 'import libvirt, libvirt_qemu'"
    assert "No module named 'libvirt'" in machine.run(imported).err
    machine.do("apt-get -y install python3-libvirt")
    machine.do(imported)


def test_a_running_merge_is_not_pulled_away(machine: CleanRoot) -> None:
    top = build_pair(machine.path / "srv/slow")
    qemu_io(top, f"write -P 0x33 {8 * MIB} {40 * MIB}")
    # In one shell: what it starts ends with it, and is seen by no other.
    told = machine.run(
        "chainmerge merge --bandwidth 4M --delete /srv/slow/top.qcow2 >/dev/null 2>&1 & merge=$!\n"
        "until ls -A /srv/slow | grep -q merge; do kill -0 $merge 2>&1 || exit 9; done\n"
        "apt-get -y remove chainmerge && exit 8\n"
        "wait $merge && [ ! -e /srv/slow/top.qcow2 ]"
    )
    assert told.status == 0, told
    assert "chainmerge is running (process " in told.err
    assert machine.do("chainmerge --version && dpkg-query -W -f '${Status}' chainmerge").endswith(
        "install ok installed"
    )


def test_purged_without_a_trace(
    debian: Debian, deb: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with clean_root(debian.codename, tmp_path_factory.mktemp("debian") / "root") as root:
        package = root.receive(deb)
        root.do(f'apt-get -y satisfy "$(dpkg-deb -f {package} Depends)"')
        before = root.everything()
        root.do(f"apt-get -y install {package}")
        assert_merges(root, "chainmerge")
        root.do("chainmerge scan --no-cache /srv && chainmerge status /srv")
        assert root.everything() != before
        root.do("apt-get -y purge chainmerge")
        assert root.everything() == before
        root.do(f"apt-get -y install {package}")
        unfinished = root.path / "var/lib/chainmerge/volume.chainmerge-merge"
        unfinished.parent.mkdir()
        unfinished.touch()
        assert "kept: /var/lib/chainmerge" in root.run("apt-get -y purge chainmerge").err
        assert unfinished.exists()
