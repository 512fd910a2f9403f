# SPDX-License-Identifier: Apache-2.0
"""Values on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from chainmerge.arithmetic.durations import seconds_of
from chainmerge.options import ANY_IMAGE, LARGEST

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Size(click.ParamType[int]):
    """A number of bytes, as QEMU's tools write it: ``65536``, ``64K``, ``100M``, ``2G``."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        # Imported where it is used: few commands are given a size.
        from chainmerge.arithmetic.sizes import bytes_of  # noqa: PLC0415

        size = bytes_of(value)
        if size is None:
            self.fail(
                f"{value!r} is not a size: write a whole number, or one like 64K or 2G", param, ctx
            )
        if size > LARGEST:
            self.fail(f"{value!r} is larger than any image can be", param, ctx)
        return size


class Duration(click.ParamType[int]):
    """A number of seconds, written with a unit: ``90m``, ``12h``, ``7d``, ``4w``."""

    name = "duration"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        seconds = seconds_of(value)
        if seconds is None:
            self.fail(
                f"{value!r} is not a duration: write a whole number and a unit, like 12h, 7d or 4w",
                param,
                ctx,
            )
        return seconds


class PathFormat(click.ParamType[tuple[str, str]]):
    """An image and its format: ``disk.img=raw``."""

    name = "path=format"

    def convert(
        self,
        value: str | tuple[str, str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        # A path may hold an equals sign, the name of a format does not.
        path, found, image_format = value.rpartition("=")
        if not (found and path and re.fullmatch(r"[a-z0-9-]+", image_format)):
            self.fail(f"{value!r} is not of the form PATH=FORMAT, like disk.img=raw", param, ctx)
        return path, image_format

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        del ctx, param
        from chainmerge.cli.candidates import format_candidates  # noqa: PLC0415 (for a shell)

        return format_candidates(incomplete)


class KeyFile(click.ParamType[tuple[str, str]]):
    """A file with a passphrase, for all images or, as ``disk.qcow2=key``, for one."""

    name = "key file"

    def convert(
        self,
        value: str | tuple[str, str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        # A path may hold an equals sign too.
        image, found, key_file = value.rpartition("=")
        if not found or Path(value).exists():
            return ANY_IMAGE, value
        if not (image and key_file):
            self.fail(f"{value!r} is not of the form [IMAGE=]FILE", param, ctx)
        return image, key_file

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        del ctx, param
        from chainmerge.cli.candidates import key_file_candidates  # noqa: PLC0415 (for a shell)

        return key_file_candidates(incomplete)


class Image(click.Path):
    """An image. Whether it is there and what it is, the API says better."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        del ctx, param
        from chainmerge.cli.candidates import image_candidates  # noqa: PLC0415 (for a shell)

        return image_candidates(incomplete)


class Place(Image):
    """Where to look for images: an image, a directory, or a volume group."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        del ctx, param
        from chainmerge.cli.candidates import place_candidates  # noqa: PLC0415 (for a shell)

        return place_candidates(incomplete)


class Directory(click.Path):
    """A directory, which is judged where it is used."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        del ctx, param
        from click.shell_completion import CompletionItem  # noqa: PLC0415 (for a shell)

        return [CompletionItem(incomplete, type="dir")]


class DomainOfLibvirt(click.ParamType[str]):
    """A domain of libvirt, which is looked up where it is used."""

    name = "domain"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        del param
        from chainmerge.cli.candidates import domain_candidates  # noqa: PLC0415 (for a shell)

        return domain_candidates(ctx, incomplete)


class DiskOfDomain(click.ParamType[str]):
    """A disk of the domain that ``--domain`` names."""

    name = "target"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        del param
        from chainmerge.cli.candidates import disk_candidates  # noqa: PLC0415 (for a shell)

        return disk_candidates(ctx, incomplete)


SIZE: Final = Size()
KEY_FILE: Final = KeyFile()
DURATION: Final = Duration()
PATH_FORMAT: Final = PathFormat()
IMAGE: Final = Image(readable=False)
PLACE: Final = Place(readable=False)
DIRECTORY: Final = Directory()
DOMAIN: Final = DomainOfLibvirt()
DISK_TARGET: Final = DiskOfDomain()
