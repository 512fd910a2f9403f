# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between the user and the API."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Failed, Misuse, Refused


class InternalError(Failed):
    """A bug: an exception that nobody meant to raise."""

    code: ClassVar[str] = "internal-error"
    template: ClassVar[str] = "internal error: {kind}: {detail}"
    hint: ClassVar[str] = (
        "please report this, with the output of the same command and --debug; images are in a "
        "state that the same command finishes"
    )
    explanation: ClassVar[str] = (
        "chainmerge met a situation that it does not handle. That is a bug in chainmerge, not a "
        "mistake of yours. Its changes to images become visible in single atomic steps, so that an "
        "image holds the state before or after such a step. `chainmerge check` and `chainmerge "
        "bitmaps list` show which."
    )
    kind: str
    detail: str


class ReportNotDelivered(Failed):
    """The work is done, but the report cannot be written to standard output."""

    code: ClassVar[str] = "report-not-delivered"
    template: ClassVar[str] = "the report could not be written to standard output: {reason}"
    hint: ClassVar[str] = (
        "make room where standard output goes, then run the same command again: it finds what is "
        "already done"
    )
    explanation: ClassVar[str] = (
        "The command did its work, but its report could not be written, for example "
        "because standard output is a file on a full file system. Without its report "
        "a success is of little use to a program, so the exit status is that of a failure."
    )
    reason: str


class WrongUsage(Misuse):
    """The command line names what does not exist, or leaves out what is needed."""

    code: ClassVar[str] = "usage"
    template: ClassVar[str] = "{problem}"
    hint: ClassVar[str] = "{suggestion}"
    explanation: ClassVar[str] = (
        "The command line could not be understood, and nothing was done: a command or an option "
        "does not exist, an argument is missing, or a value is not one that can be given there. "
        "`chainmerge --help` lists the commands, `chainmerge COMMAND --help` their options."
    )
    problem: str
    suggestion: str


class DiskNotNamed(Misuse):
    """A command for a running VM does not say which disk of which VM."""

    code: ClassVar[str] = "disk-not-named"
    template: ClassVar[str] = "which disk of which VM is not given, or is given twice"
    hint: ClassVar[str] = (
        "give --qmp SOCKET and --device ID or --node NODE, or --domain NAME and --disk TARGET; "
        "`live merge` takes --all-disks instead of the disk"
    )
    explanation: ClassVar[str] = (
        "A live merge is done by the VM's own QEMU, which is reached by its monitor. --qmp names "
        "the monitor's socket; --device or --node says which of its disks is meant. The QEMU of "
        "a domain is reached through libvirt alone: --domain and --disk say which disk is meant."
    )


class NotConfirmed(Refused):
    """The question whether to go on was answered with no."""

    code: ClassVar[str] = "not-confirmed"
    template: ClassVar[str] = "{image}: not confirmed, and nothing was changed"
    hint: ClassVar[str] = "run the same command again and answer with y, if that is what you want"
    explanation: ClassVar[str] = (
        "What cannot be undone, and removes much at once, is done only after a question, or with "
        "--yes. The answer was no."
    )
    image: str


class NotAReport(Refused):
    """A report was to be written over a file that is something else."""

    code: ClassVar[str] = "not-a-report"
    template: ClassVar[str] = "{file} is there already, and is not a report of chainmerge"
    hint: ClassVar[str] = "name another file for the report"
    explanation: ClassVar[str] = (
        "A report replaces an older report of the same name, and an empty file, but nothing else: "
        "the name of an image in the wrong place must not cost its data. Nothing was changed."
    )
    file: str


class ReportFileUnusable(Refused):
    """A report cannot be written to its file."""

    code: ClassVar[str] = "report-file-unusable"
    template: ClassVar[str] = "the report cannot be written to {file}: {reason}"
    hint: ClassVar[str] = "name a file in a directory that you can write to, with room for it"
    explanation: ClassVar[str] = (
        "The file of a report is written as a whole, beside an older one of that name, which it "
        "then replaces. The directory does not allow that, or is not there, or is full. A merge "
        "writes its report for the first time before it changes anything, so nothing was changed."
    )
    file: str
    reason: str


class ReportFileNotWritten(Failed):
    """The work is done, but its report cannot be written to its file."""

    code: ClassVar[str] = "report-file-not-written"
    template: ClassVar[str] = (
        "the merge has ended as it was said, but its report {file} could not be written: {reason}"
    )
    hint: ClassVar[str] = (
        "make room there; `chainmerge report -o FILE IMAGE` draws what the images are now"
    )
    explanation: ClassVar[str] = (
        "The report was written when the merge began, and could not be replaced when it had ended, "
        "for example because the file system has become full. What became of the merge is in what "
        "the command has printed. The report still shows the state before it."
    )
    file: str
    reason: str


class MetricsMissing(Misuse):
    """The Python package that writes metrics is not there."""

    code: ClassVar[str] = "metrics-missing"
    template: ClassVar[str] = "the Python package prometheus-client cannot be used: {reason}"
    hint: ClassVar[str] = "pip install 'chainmerge[metrics]'"
    explanation: ClassVar[str] = (
        "--textfile writes metrics for Prometheus with its Python package 'prometheus-client'. It "
        "is optional: nothing else needs it. Nothing was scanned."
    )
    reason: str
