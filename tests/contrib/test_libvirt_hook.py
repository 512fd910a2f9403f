# SPDX-License-Identifier: Apache-2.0
"""The hook of libvirt's: which domains start, asked by a real libvirtd and as libvirt asks it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

import libvirt
import pytest

from tests.support.cli import Ran, chainmerge
from tests.support.domain_vm import running_domain
from tests.support.libvirtd import libvirtd
from tests.support.operating import chain, installed, kill_while_copying, path_with
from tests.support.qemu import content

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.timeout(180)

HOOK: Final = Path(__file__).parents[2] / "contrib" / "libvirt" / "hooks" / "qemu"
DISK: Final = "<disk type='file' device='{device}'><source file='{path}'/></disk>"


def described(images: Sequence[Path], device: str = "disk") -> str:
    disks = "".join(DISK.format(device=device, path=escape(str(image))) for image in images)
    return f"<domain><name>vm</name><devices>{disks}</devices></domain>"


def asked(
    program: Path, xml: str, *words: str, moment: str = "prepare begin", domain: str = "vm"
) -> Ran:
    """What the hook answers, where chainmerge is found in the directory *program*."""
    ran = subprocess.run(
        [HOOK, *words, domain, *moment.split(), "-"],
        input=xml.encode("utf-8", "surrogateescape"),
        capture_output=True,
        check=False,
        env={"PATH": path_with(program)},
        timeout=60,
    )
    return Ran(ran.returncode, ran.stdout.decode(), ran.stderr.decode())


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return installed(tmp_path / "bin")


@pytest.fixture
def interrupted(tmp_path: Path) -> list[Path]:
    """A chain in the middle of which a merge was killed."""
    (tmp_path / "images").mkdir()
    images = chain(tmp_path / "images", ("base", "snap1", "active"), mib=8)
    kill_while_copying(images[0], "--base", str(images[0]), str(images[1]))
    return images


def test_no_domain_starts_before_the_merge_is_finished(
    interrupted: list[Path], program: Path, tmp_path: Path
) -> None:
    base, top, active = interrupted
    shown = content(active)
    place = tmp_path / "libvirt"
    with libvirtd(place, hook=HOOK.read_text(), path=path_with(program)) as uri:
        with (
            pytest.raises(libvirt.libvirtError, match="is not finished") as refused,
            running_domain(tmp_path / "vm", uri, interrupted),
        ):
            pass
        said = str(refused.value)
        assert f"the merge of {top} into {base} is not finished" in said
        finish, undo = re.findall("`chainmerge ([^`]+)`", said)
        assert shlex.split(undo)[0] == "cancel"
        assert chainmerge(*shlex.split(finish)).status == 0
        with running_domain(tmp_path / "vm", uri, [base, active]) as domain:
            assert domain.alive
    assert content(active) == shown


def test_a_libvirtd_whose_hook_is_broken_starts_domains(tmp_path: Path) -> None:
    images = chain(tmp_path, ("base", "active"))
    broken = HOOK.read_text().replace("def images_of(xml):", "def images_of(xml):\n    fail()")
    with (
        libvirtd(tmp_path / "libvirt", hook=broken) as uri,
        running_domain(tmp_path / "vm", uri, images) as domain,
    ):
        assert domain.alive


def test_safe_ones_start_on_request(interrupted: list[Path], program: Path) -> None:
    xml = described(interrupted[-1:])
    assert asked(program, xml).status == 1
    assert asked(program, xml, "--let-safe-ones-start").status == 0


def test_each_merge_is_said_once_and_other_disks_do_not_matter(
    interrupted: list[Path], program: Path, tmp_path: Path
) -> None:
    other = chain(tmp_path, ("other",))
    ran = asked(program, described([*other, tmp_path / "missing", *interrupted]))
    assert ran.status == 1
    (line,) = ran.err.splitlines()
    assert line.startswith(f"chainmerge: the merge of {interrupted[1]} into {interrupted[0]} is")
    assert asked(program, described(other)).status == 0
    assert asked(program, described(interrupted, device="cdrom")).status == 0


def test_a_domain_called_like_the_option_is_a_domain(
    interrupted: list[Path], program: Path
) -> None:
    xml = described(interrupted[-1:])
    assert asked(program, xml, domain="--let-safe-ones-start").status == 1


def test_a_name_makes_no_line_of_its_own(tmp_path: Path) -> None:
    program = installed(tmp_path / "bin")
    heard = tmp_path / "heard"
    (program / "logger").write_text(f'#!/bin/sh\nprintf "%s" "$6" >{heard}\n')
    (program / "logger").chmod(0o755)
    name = "a\n<0>forged\x1b[31m"
    merge: dict[str, object] = {"top": name, "base": "b", "process": None, "vm_may_start": False}
    merge |= {"command": "finish", "cancel_command": None}
    message, answer = {"message": f"{name}\udcff: no such file"}, {"merges": [merge]}
    for status, said in ((1, message), (5, answer)):
        (tmp_path / "said").write_text(json.dumps(said))
        (program / "chainmerge").write_text(f"#!/bin/sh\ncat {tmp_path}/said; exit {status}\n")
        ran = asked(program, described([tmp_path / "image"]))
        (line,) = ran.err.splitlines()
        assert r"a\n<0>forged\x1b[31m" in line
    assert r"a\n<0>forged\x1b[31m\udcff: no such file" in heard.read_text()


@pytest.mark.parametrize("moment", ["start begin", "stopped end", "prepare end", "release end"])
def test_other_moments_are_none_of_its_business(
    interrupted: list[Path], program: Path, moment: str
) -> None:
    ran = asked(program, described(interrupted), moment=moment)
    assert (ran.status, ran.out, ran.err) == (0, "", "")


def _missing(program: Path) -> None:
    (program / "chainmerge").unlink()


def _failing(program: Path) -> None:
    (program / "chainmerge").write_text("#!/bin/sh\necho no >&2; exit 1\n")


def _speaking_of_something_else(program: Path) -> None:
    (program / "chainmerge").write_text("#!/bin/sh\necho '{\"a\": 1}'\n")


@pytest.mark.parametrize("breaks", [_missing, _failing, _speaking_of_something_else])
def test_a_chainmerge_that_does_not_answer_keeps_nothing_from_starting(
    tmp_path: Path, breaks: Callable[[Path], None]
) -> None:
    program = installed(tmp_path / "bin")
    breaks(program)
    heard = tmp_path / "heard"
    (program / "logger").write_text(f'#!/bin/sh\necho "$@" >{heard}\n')
    (program / "logger").chmod(0o755)
    ran = asked(program, described([tmp_path / "image"]))
    assert ran.status == 0
    assert "domain vm starts unchecked" in ran.err
    assert "-p daemon.warning -- domain vm starts unchecked" in heard.read_text()


@pytest.mark.parametrize("xml", ["", "<domain>", "<domain/>", described([])])
def test_what_is_not_understood_starts(program: Path, xml: str) -> None:
    assert asked(program, xml).status == 0
