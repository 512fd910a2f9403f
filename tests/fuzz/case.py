# SPDX-License-Identifier: Apache-2.0
"""One case: a chain with a damaged image, the commands that are run on it, and what must hold."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chainmerge.errors import ExitCode
from tests.fuzz.anatomy import Anatomy, anatomy_of
from tests.fuzz.confined import Ended, run_confined
from tests.fuzz.corpus import BREEDS, Breed, Chain, build
from tests.fuzz.mutation import mutate
from tests.support.hostile import chainmerge

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS_FOR_QEMU: Final = 30
_LARGEST_DISK: Final = 64 << 20
_SIZE: Final = slice(24, 32)

# What the operating system was asked for in vain was too much.
_RUDE: Final = ("Traceback", "internal-error", "out-of-memory", "system-call-failed")

_WAYS: Final = (
    (),
    ("--data", "in-place"),
    ("--data", "cow"),
    ("--direction", "pull"),
    ("--delete",),
    ("--keep-name",),
    ("--detect-zeroes",),
    ("--drop-bitmaps",),
    ("--drop-snapshots",),
    ("--verify", "metadata"),
    ("--base", "root"),
)


@dataclass(frozen=True)
class Finding:
    """Something that must not happen."""

    seed: str
    what: str
    details: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return "\n    ".join((f"{self.seed}: {self.what}", *self.details))


class Stable:
    """The sound chains, built once in a directory, and their anatomies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._warm_up()

    def _warm_up(self) -> None:
        """Have loaded what the children need."""
        chain = build(self.directory / "warm", BREEDS[0])
        top = str(chain.image("top"))
        for command in (("check",), ("info",), ("bitmaps", "list"), ("plan",), ("merge", "--json")):
            assert chainmerge(*command, top).status == ExitCode.DONE
        assert chainmerge("repair", "--yes", top).status == ExitCode.DONE
        assert chainmerge("plan", "--json", str(chain.image("root"))).status == ExitCode.USAGE

    @cache  # noqa: B019 (one stable lives as long as the process)
    def chain(self, breed: Breed) -> Chain:
        return build(self.directory / breed.name.replace(" ", "-").replace(",", ""), breed)

    @cache  # noqa: B019
    def anatomy(self, breed: Breed, role: str) -> Anatomy:
        return anatomy_of(self.chain(breed).image(role).read_bytes())


@dataclass(frozen=True)
class Case:
    """What a seed says: a breed, the damaged images, the options and the last command."""

    seed: str
    breed: Breed
    damaged: dict[str, bytes]
    said: tuple[str, ...]
    options: tuple[str, ...]
    repairs: bool
    refcounts_rebuilt: bool


def case_of(seed: str, stable: Stable) -> Case:
    """The case of a seed, the same each time."""
    chance = random.Random(seed)
    breed = chance.choice(BREEDS)
    chain = stable.chain(breed)
    damaged: dict[str, bytes] = {}
    said: list[str] = []
    roles = chain.qcow2_roles
    for role in chance.sample(roles, 1 if chance.random() < 0.85 else len(roles)):
        content = chain.image(role).read_bytes()
        damaged[role], changes = mutate(content, stable.anatomy(breed, role), chance)
        said += [f"{role}: {change}" for change in changes]
    ways = [way for way in _WAYS if "root" not in way or "root" in chain.roles]
    options = tuple(option for way in chance.sample(ways, chance.randrange(3)) for option in way)
    return Case(
        seed=seed,
        breed=breed,
        damaged=damaged,
        said=tuple(said),
        options=options,
        repairs=chance.random() < 0.2,
        refcounts_rebuilt=chance.random() < 0.2,
    )


def findings_of(seed: str, stable: Stable) -> Iterator[Finding]:
    """Run the case of a seed."""
    case = case_of(seed, stable)
    with tempfile.TemporaryDirectory(dir=stable.directory) as scratch:
        chain = Chain(Path(scratch) / "images", case.breed)
        shutil.copytree(stable.chain(case.breed).directory, chain.directory)
        (Path(scratch) / "outside").write_bytes(b"not for you")
        for role, content in case.damaged.items():
            chain.image(role).write_bytes(content)
            if case.refcounts_rebuilt:
                _rebuild_refcounts(chain.image(role))
        details = (*case.said, f"{case.breed.name}; {' '.join(case.options)}")
        if case.refcounts_rebuilt:
            details += ("refcounts rebuilt by QEMU",)
        for what in _offences(chain, case, Path(scratch) / "before"):
            yield Finding(seed, what, details)


def _offences(chain: Chain, case: Case, before: Path) -> Iterator[str]:
    shutil.copytree(chain.directory, before)
    top = str(chain.image("top"))
    options = tuple(
        str(chain.image(option)) if option == "root" else option for option in case.options
    )
    looking = [
        *(("check", "--json", str(chain.image(role))) for role in chain.qcow2_roles),
        ("info", top),
        ("bitmaps", "list", top),
        ("plan", "--lock-wait", "0", "--json", *options, top),
    ]
    victim = str(chain.image(next(iter(case.damaged))))
    last = ("repair", "--yes", victim) if case.repairs else ("merge", *options, top)
    outcome = run_confined(chain.directory, [*looking, (*last, "--lock-wait", "0")])
    yield from outcome.offences
    for ended in outcome.ended:
        yield from rudeness(ended)
    for ended in outcome.ended[: len(looking)]:
        if ended.status is None:
            return
    done = outcome.ended[-1]
    if case.repairs:
        yield from _wrong_repair(done, Path(victim), before)
    else:
        corrupt = [
            one.command[-1]
            for one in outcome.ended[: len(chain.qcow2_roles)]
            if one.status not in (ExitCode.DONE, ExitCode.REFUSED)
        ]
        yield from _wrong_merge(done, chain, case, before, corrupt)


def rudeness(ended: Ended) -> Iterator[str]:
    """What no command may say, whatever it is given."""
    command = " ".join(ended.command[:2])
    if ended.status is None:
        yield f"{command}: {ended.err}"
    said = ended.out + ended.err
    # Error codes are in what is said to the end: "chainmerge explain CODE".
    if any(word in said for word in _RUDE):
        yield f"{command}: {said.strip().splitlines()[0][:300]}"
    if any(not (letter.isprintable() or letter == "\n") for letter in said):
        yield f"{command}: says what no terminal should be told: {said!r}"


def _wrong_merge(
    done: Ended, chain: Chain, case: Case, before: Path, corrupt: list[str]
) -> Iterator[str]:
    changed = _changed(chain.directory, before)
    if done.status is None:
        return
    if done.status == ExitCode.REFUSED and changed:
        yield f"a merge that is refused changed {changed}"
    if done.status != ExitCode.DONE:
        # With its name to be kept, it may be top that is written.
        if "top" in changed and not {"pull", "--keep-name"} & set(case.options):
            yield "a merge that failed changed top"
        if changed:
            yield from _other_content(before / "top", chain.image("top"))
        return
    pulls = "pull" in case.options
    result = chain.image("top" if pulls or "--keep-name" in case.options else "base")
    if "--base" in case.options and not pulls and "--keep-name" not in case.options:
        result = chain.image("root")
    if not result.exists():
        # Where both ways leave one image under top's name, the cheaper one is taken.
        result = chain.image("top")
    merged = [path for path in corrupt if Path(path).name in ("base", "top")]
    if merged:
        yield f"merged although the check finds {merged} corrupt"
    yield from _other_content(before / "top", result)
    if _is_qcow2(result):
        report = _qemu("check", "--output=json", "-U", str(result))
        if report is not None and report.returncode not in (0, 3):
            yield f"after the merge: {report.stdout[-300:]!r}"


def _wrong_repair(done: Ended, image: Path, before: Path) -> Iterator[str]:
    if done.status is None:
        return
    changed = image.read_bytes() != (before / image.name).read_bytes()
    if done.status == ExitCode.REFUSED and changed:
        yield "a repair that is refused changed the image"
    if done.status == ExitCode.DONE and changed:
        yield from _other_content(before / image.name, image)


def _other_content(before: Path, after: Path) -> Iterator[str]:
    """Whether QEMU read something else before."""
    old, new = _content(before), _content(after)
    if old is None:
        return
    if new is None:
        yield f"QEMU could read {before.name}, and cannot read {after.name}"
    elif not new.startswith(old):
        at = next(i for i in range(len(old)) if old[i : i + 1] != new[i : i + 1])
        yield f"QEMU reads another {after.name}, from guest byte {at:#x} on"


def _changed(directory: Path, before: Path) -> list[str]:
    old, new = ({path.name: path for path in place.iterdir()} for place in (before, directory))
    return sorted(
        name
        for name in old.keys() | new.keys()
        if name not in old or name not in new or old[name].read_bytes() != new[name].read_bytes()
    )


def _is_qcow2(image: Path) -> bool:
    with image.open("rb") as file:
        return file.read(4) == b"QFI\xfb"


def _content(image: Path) -> bytes | None:
    """What QEMU reads; None where it does not, or where that would be too much."""
    if not image.exists():
        return None
    with image.open("rb") as file:
        head = file.read(104)
    if head[:4] != b"QFI\xfb":
        return image.read_bytes()
    if not 0 < int.from_bytes(head[_SIZE]) <= _LARGEST_DISK:
        return None
    with tempfile.TemporaryDirectory(dir=image.parent.parent) as scratch:
        raw = Path(scratch) / "raw"
        ran = _qemu("convert", "-U", "-f", "qcow2", "-O", "raw", str(image), str(raw))
        return raw.read_bytes() if ran is not None and ran.returncode == 0 else None


def _rebuild_refcounts(image: Path) -> None:
    _qemu("check", "-q", "-r", "all", "-f", "qcow2", str(image))


def _qemu(*arguments: str) -> subprocess.CompletedProcess[bytes] | None:
    """None where it takes for ever: that is QEMU's affair."""
    limited = ("prlimit", "--as=4000000000", "--fsize=200000000", "qemu-img")
    try:
        return subprocess.run(
            [*limited, *arguments], capture_output=True, check=False, timeout=_SECONDS_FOR_QEMU
        )
    except subprocess.TimeoutExpired:
        return None
