# SPDX-License-Identifier: Apache-2.0
"""The units for systemd: what systemd says of them, and that their commands work in their bounds.

No systemd runs here. What a unit takes away is taken away as far as the kernel alone can do it:
capabilities, new privileges and the right to write.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from chainmerge.errors import ExitCode
from tests.support.cli import environment
from tests.support.operating import chain, installed
from tests.support.qemu import content

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS: Final = Path(__file__).parents[2] / "contrib" / "systemd"
PROGRAM: Final = "/usr/bin/chainmerge"
MOST_EXPOSED: Final = {
    "chainmerge-fleet.service": 3.7,
    "chainmerge-scan.service": 2.6,
    "chainmerge@.service": 3.3,
}
"""What ``systemd-analyze security`` says of them; 10 is a unit without bounds."""


def settings(unit: str, key: str) -> list[str]:
    text = (UNITS / unit).read_text().replace("\\\n", " ")
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


def said_of(directory: Path, *verb: str) -> str:
    """What systemd-analyze says of the units in a directory, whose program is there."""
    files = sorted(str(path) for path in directory.glob("chainmerge*"))
    ran = subprocess.run(
        ["systemd-analyze", *verb, *files],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )
    return ran.stdout + ran.stderr


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """The units, with the program where one is."""
    program = installed(tmp_path / "bin") / "chainmerge"
    copies = tmp_path / "units"
    copies.mkdir()
    for unit in UNITS.iterdir():
        (copies / unit.name).write_text(unit.read_text().replace(PROGRAM, str(program)))
    return copies


def test_systemd_has_nothing_to_object_to(copies: Path) -> None:
    assert said_of(copies, "verify", "--man=no") == ""
    scan = copies / "chainmerge-scan.service"
    scan.write_text(scan.read_text().replace("ProtectSystem=strict", "ProtectSystm=strict"))
    assert "ProtectSystm" in said_of(copies, "verify", "--man=no")


@pytest.mark.parametrize(("unit", "most"), MOST_EXPOSED.items())
def test_units_are_shut_in(unit: str, most: float, tmp_path: Path) -> None:
    (tmp_path / unit).write_bytes((UNITS / unit).read_bytes())
    said = said_of(tmp_path, "security", "--offline=yes")
    (level,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert float(level) <= most


def test_the_pages_that_are_named_are_of_commands() -> None:
    for unit in UNITS.iterdir():
        for page in " ".join(settings(unit.name, "Documentation")).split():
            assert re.fullmatch(r"man:chainmerge-(scan|report|merge|fleet-worker)\(1\)", page)


def commands(unit: str, variables: dict[str, str], image: str = "") -> Iterator[list[str]]:
    """The commands of a unit as systemd makes them, without the program."""
    for line in settings(unit, "ExecStart"):
        program, *words = line.split()
        assert program.removeprefix(":") == PROGRAM
        found: list[str] = []
        for word in words:
            if word == "%f":
                found.append(image)
            elif match := re.fullmatch(r"\$\{(\w+)\}", word):
                found.append(variables[match[1]])
            elif word.startswith("$"):
                found += variables[word[1:]].split()
            else:
                found.append(word)
        yield found


def shut_in(unit: str, writable: list[Path], program: Path, words: list[str]) -> list[str]:
    """A command in the bounds of a unit; it can write to these directories alone.

    systemd starts it with signals as they are by default, whatever those of the tests are.
    """
    kept = " ".join(settings(unit, "CapabilityBoundingSet")).lower().replace("cap_", "+").split()
    opened = "".join(
        f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(path))}\n" for path in writable
    )
    script = f"""{opened}mount -o remount,bind,ro /
        bounds={",".join(["-all", *kept])}
        set -- setpriv --inh-caps=-all --bounding-set=$bounds --no-new-privs "$@"
        exec env --default-signal=INT "$@"
    """
    return ["unshare", "--mount", "sh", "-ec", script, "sh", str(program / "chainmerge"), *words]


def test_a_scan_reads_what_belongs_to_others(tmp_path: Path) -> None:
    unit = "chainmerge-scan.service"
    images, state = tmp_path / "images", tmp_path / "state"
    images.mkdir()
    state.mkdir()
    for image in chain(images, ("base", "top")):
        os.chown(image, 1234, 1234)
        image.chmod(0o600)
    variables = {
        "CHAINMERGE_SCAN": str(images),
        "CHAINMERGE_REPORT": str(state / "chains.html"),
        "CHAINMERGE_TEXTFILE": str(state / "chainmerge.prom"),
    }
    assert variables.keys() == {line.split("=")[0] for line in settings(unit, "Environment")}
    program = installed(tmp_path / "bin")
    for words in commands(unit, variables):
        ran = subprocess.run(
            shut_in(unit, [state], program, words),
            capture_output=True,
            text=True,
            check=False,
            env=environment(XDG_STATE_HOME=str(state)),
        )
        assert ran.returncode == 0, ran.stderr
        steps = [line.partition(" info: ")[2] for line in ran.stderr.splitlines()]
        assert steps[0] == "looking for images"
    assert str(images / "top.qcow2") in (state / "chains.html").read_text()
    metrics = state / "chainmerge.prom"
    known = re.findall(
        r"^chainmerge_chain_has_problem\{.*\} (.*)$", metrics.read_text(), re.MULTILINE
    )
    assert known == ["0.0"]
    assert metrics.stat().st_mode & 0o777 == 0o644
    unwritable = shut_in(unit, [], program, ["report", "-o", str(state / "more"), str(images)])
    refused = subprocess.run(unwritable, capture_output=True, check=False, env=environment())
    assert refused.returncode == ExitCode.REFUSED


def test_a_merge_is_stopped_and_finished(tmp_path: Path) -> None:
    unit = "chainmerge@.service"
    images = tmp_path / "images of $HOME"
    images.mkdir()
    base, top, active = chain(images, ("base", "snap-1", "active"), mib=8)
    os.chown(base, 1234, 1234)
    shown = content(active)
    configuration = tmp_path / "config.toml"
    configuration.write_text('[merge]\nbandwidth = "2M"\n')
    (words,) = commands(unit, {}, image_of_instance(top))
    merge = shut_in(unit, [images], installed(tmp_path / "bin"), words)
    known = environment(CHAINMERGE_CONFIG=str(configuration))
    (name,) = settings(unit, "KillSignal")
    with subprocess.Popen(merge, stderr=subprocess.PIPE, text=True, env=known) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "copying data" in line:
                process.send_signal(signal.Signals[name])
                break
        process.stderr.read()
    assert process.returncode == ExitCode.INTERRUPTED
    # Whoever waits for the unit is not told that the merge is done.
    assert not settings(unit, "SuccessExitStatus")
    configuration.write_text("[merge]\ndelete = true\n")
    ran = subprocess.run(merge, capture_output=True, text=True, check=False, env=known)
    assert ran.returncode == 0, ran.stderr
    assert not top.exists()
    assert content(active) == shown


def image_of_instance(image: Path) -> str:
    """The path that systemd makes of the instance that the unit's comment names."""

    def escape(*arguments: str) -> str:
        ran = subprocess.run(
            ["systemd-escape", *arguments], capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    unit = escape("--path", "--template=chainmerge@.service", str(image))
    return escape("--unescape", "--path", unit.removeprefix("chainmerge@").removesuffix(".service"))
