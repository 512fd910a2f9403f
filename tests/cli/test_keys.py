# SPDX-License-Identifier: Apache-2.0
"""What the key does that completes a word, in real shells, with the files that packages install."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from manual.completions import write_completions
from tests.support import qemu
from tests.support.cli import environment
from tests.support.images import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Ctrl-T does what the key does, shows what the line is by then, and takes it away.
_BASH: Final = """\
shown() { printf '<%s>\\n' "$READLINE_LINE"; READLINE_LINE=; }; bind 'set bell-style none'
bind -x '"\\C-g\\C-s": shown'; bind '"\\C-t": "\\t\\C-g\\C-s"'
source FOLDER/bash/chainmerge
echo ready
"""
_ZSH: Final = """\
unsetopt beep; LOAD
pressed() { zle expand-or-complete; zle -I; print -r -- "<$BUFFER>"; BUFFER= }; zle -N pressed
bindkey '^T' pressed
echo ready
"""
_COMPINIT: Final = "autoload -U compinit; compinit -u -D"
_SHELLS: Final = {
    "bash": ("bash", "--norc", _BASH),
    "zsh": ("zsh", "-f", _ZSH.replace("LOAD", f"fpath+=(FOLDER/zsh); {_COMPINIT}")),
    "zsh, as in ~/.zshrc": (
        *("zsh", "-f"),
        _ZSH.replace("LOAD", f"{_COMPINIT}; source <(chainmerge completion zsh)"),
    ),
}
_LINE: Final = re.compile(r"<chainmerge (.*)>\r?\n")

# What is typed, and what the key makes of it.
SAME_IN_ALL: Final = {
    "fla": "flatten ",
    "merge --dry": "merge --dry-run ",
    # There may be more below it.
    "merge disks": "merge disks/",
    "merge --search=disks": "merge --search=disks/",
    "merge --verify=f": "merge --verify=full ",
    "merge --verify f": "merge --verify full ",
    "merge a:": "merge a:b.qcow2 ",
    "merge a:b": "merge a:b.qcow2 ",
    "merge --base=a:b": "merge --base=a:b.qcow2 ",
    "merge x=": "merge x=y.qcow2 ",
    "merge d:r/": "merge d:r/image.qcow2 ",
    "merge --format disk.im": "merge --format disk.img=",
    "merge --format disk.img=ra": "merge --format disk.img=raw ",
    "merge --format=disk.img=ra": "merge --format=disk.img=raw ",
    "merge --report=rep": "merge --report=report.html ",
    "explain image-lo": "explain image-locked ",
    "completion f": "completion fish ",
}
WITH_BACKSLASHES: Final = {
    "merge my": r"merge my\ disk.qcow2 ",
    "merge --base=my": r"merge --base=my\ disk.qcow2 ",
    "bitmaps remove disk.img tw": r"bitmaps remove disk.img two\ words ",
}
IN_BASH: Final = {
    "merge a": r"merge a\:b.qcow2 ",
    "merge u@": r"merge u\@h.qcow2 ",
    "merge u@h": r"merge u\@h.qcow2 ",
    'merge "my': 'merge "my disk.qcow2" ',
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with images of all kinds of names."""
    folder = tmp_path / "images"
    for directory in ("disks", "d:r"):
        (folder / directory).mkdir(parents=True)
    for name in ("a:b.qcow2", "x=y.qcow2", "u@h.qcow2", "my disk.qcow2", "d:r/image.qcow2"):
        (folder / name).touch()
    qemu.create(folder / "disk.img", MIB)
    qemu.qemu_img("bitmap", "--add", folder / "disk.img", "two words")
    (folder / "report.html").touch()
    return folder


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What packages install for shells."""
    write_completions(tmp_path / "completions")
    return tmp_path / "completions"


class Line:
    """The line of an interactive shell."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal

    def after_key(self, typed: str) -> str:
        """What *typed*, behind the program's name, has become once the key is pressed."""
        os.write(self._terminal, f"chainmerge {typed}\x14".encode())
        return self.read_until(_LINE)[1]

    def read_until(self, expected: re.Pattern[str]) -> re.Match[str]:
        """Wait for something to be shown; a test that waits in vain runs out of time."""
        shown = ""
        while not (found := expected.search(shown)):
            shown += os.read(self._terminal, 1).decode(errors="replace")
        return found


@contextmanager
def line_of(shell: str, where: Path, program: Path, installed: Path) -> Iterator[Line]:
    name, no_settings, start = _SHELLS[shell]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(where)
        path = f"{program}:{os.environ['PATH']}"
        # TERM=dumb: nothing is drawn but what is there.
        more = {"PATH": path, "TERM": "dumb", "PS1": "> "}
        os.execvpe(name, [name, no_settings, "-i"], environment(**more))
    try:
        line = Line(terminal)
        os.write(terminal, start.replace("FOLDER", str(installed)).encode())
        line.read_until(re.compile(r"^ready\r?\n", re.MULTILINE))
        yield line
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        ("bash", SAME_IN_ALL | WITH_BACKSLASHES | IN_BASH),
        ("zsh", SAME_IN_ALL | WITH_BACKSLASHES),
        ("zsh, as in ~/.zshrc", {"fla": "flatten ", "merge --base=a:": "merge --base=a:b.qcow2 "}),
    ],
)
def test_the_key(
    shell: str, expected: dict[str, str], images: Path, program: Path, installed: Path
) -> None:
    with line_of(shell, images, program, installed) as line:
        assert {typed: line.after_key(typed) for typed in expected} == expected


def test_the_key_in_fish(images: Path, program: Path, installed: Path) -> None:
    """Fish says without a terminal what its key would make of the last word."""
    script = 'for typed in $argv; complete --do-complete "chainmerge $typed"; end'
    typed = [*SAME_IN_ALL, "merge my", "merge --base=my"]
    ran = subprocess.run(
        ["fish", "--no-config", "-c", f"source {installed}/fish/chainmerge.fish; {script}", *typed],
        capture_output=True,
        check=True,
        cwd=images,
        env=environment(PATH=f"{program}:{os.environ['PATH']}"),
    )
    said = [line.partition("\t")[0] for line in ran.stdout.decode().splitlines()]
    last_words = [becomes.rstrip().rpartition(" ")[2] for becomes in SAME_IN_ALL.values()]
    assert said == [*last_words, "my disk.qcow2", "--base=my disk.qcow2"]
