# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a fleet, beside what goes wrong with its merges."""

from __future__ import annotations

from typing import ClassVar

from chainmerge.errors import Failed, Misuse, Refused


class FleetExtraMissing(Misuse):
    """The packages that the commands of the fleet need are not installed."""

    code: ClassVar[str] = "fleet-extra-missing"
    template: ClassVar[str] = "the fleet needs packages that are not installed: {reason}"
    hint: ClassVar[str] = "install them with `pip install 'chainmerge[fleet]'`"
    explanation: ClassVar[str] = (
        "Jobs of a fleet lie in a PostgreSQL database. What talks to it is an optional part of the "
        "installation, as one machine needs no fleet."
    )
    reason: str


class FleetMisconfigured(Misuse):
    """The configuration file of the fleet cannot be used."""

    code: ClassVar[str] = "fleet-misconfigured"
    template: ClassVar[str] = "{path}: {reason}"
    hint: ClassVar[str] = "correct the file; docs/fleet.md says what is in it"
    explanation: ClassVar[str] = (
        "The file says where the database is, what this host is called, and which directories and "
        "volume groups jobs may touch here. It is read strictly: an entry that is not known would "
        "otherwise be a limit that nobody keeps."
    )
    path: str
    reason: str


class FleetUnreachable(Failed):
    """The database of the fleet does not answer, or refuses a statement."""

    code: ClassVar[str] = "fleet-unreachable"
    template: ClassVar[str] = "the database of the fleet: {reason}"
    hint: ClassVar[str] = (
        "check `database` in the configuration, and that the server runs; running merges go on "
        "meanwhile, and are reported later"
    )
    explanation: ClassVar[str] = (
        "Commands of the fleet read and write a PostgreSQL database. Without it no new merge "
        "starts; those that run come to their end, and their reports wait on their hosts."
    )
    reason: str


class FleetNotSetUp(Refused):
    """The database holds no fleet, or one of another version."""

    code: ClassVar[str] = "fleet-not-set-up"
    template: ClassVar[str] = "the database holds no fleet of this version: {reason}"
    hint: ClassVar[str] = "run `chainmerge fleet init` as the owner of the database"
    explanation: ClassVar[str] = (
        "`chainmerge fleet init` makes the tables, and brings them to a new version. It does no "
        "harm to run it again."
    )
    reason: str


class FleetNewer(FleetNotSetUp):
    """The database holds a fleet of a later version of the program."""

    code: ClassVar[str] = "fleet-newer"
    template: ClassVar[str] = "the database holds a fleet of a later version: {reason}"
    hint: ClassVar[str] = "install that version on this machine"
    explanation: ClassVar[str] = (
        "Somebody has brought the fleet to a later version. To bring it back to this one would "
        "stop all workers that are of the later one, so `chainmerge fleet init` of this one "
        "refuses, too."
    )
    reason: str


class HostTaken(Refused):
    """Another machine, or another worker, has the host's name."""

    code: ClassVar[str] = "host-taken"
    template: ClassVar[str] = "the name {host} is taken: {reason}"
    hint: ClassVar[str] = (
        "give each machine a name and a machine-id of its own; if the other machine is gone for "
        "good, `chainmerge fleet release {host} --fenced` frees the name"
    )
    explanation: ClassVar[str] = (
        "One worker runs the jobs of a host. A second one would run them twice: on a machine that "
        "was cloned with its configuration, or by hand beside the service."
    )
    host: str
    reason: str


class FleetPlanUnusable(Misuse):
    """A file of jobs is not one."""

    code: ClassVar[str] = "fleet-plan-unusable"
    template: ClassVar[str] = "{path}: {reason}"
    hint: ClassVar[str] = "`chainmerge fleet plan` writes such files; nothing was submitted"
    explanation: ClassVar[str] = (
        "A file of jobs is read strictly, and all of it or nothing is submitted: an option that is "
        "not known could be the one that matters."
    )
    path: str
    reason: str


class FleetPolicyUnusable(Misuse):
    """A policy is not one."""

    code: ClassVar[str] = "fleet-policy-unusable"
    template: ClassVar[str] = "{path}: {reason}"
    hint: ClassVar[str] = "correct the file; docs/fleet.md says what is in it"
    explanation: ClassVar[str] = (
        "A policy says which chains are merged, and how. It is read strictly: what is not "
        "understood could be what keeps a chain from being merged."
    )
    path: str
    reason: str


class NoSuchJob(Misuse):
    """No job has the number, or it is not in a state for what is asked."""

    code: ClassVar[str] = "fleet-no-such-job"
    template: ClassVar[str] = "job {job}: {reason}"
    hint: ClassVar[str] = "`chainmerge fleet status` and `chainmerge fleet results` list the jobs"
    explanation: ClassVar[str] = (
        "Jobs that wait or run can be cancelled; jobs that ended without success can be tried "
        "again. What was cancelled before its host had it can be submitted again."
    )
    job: int
    reason: str


class NoSuchHost(Misuse):
    """No worker has ever come from a host of this name."""

    code: ClassVar[str] = "fleet-no-such-host"
    template: ClassVar[str] = "no host of the fleet is called {host}"
    hint: ClassVar[str] = "`chainmerge fleet status` lists the hosts"
    explanation: ClassVar[str] = (
        "A host is known once its worker has started for the first time. Until then jobs for it "
        "can be submitted, and wait."
    )
    host: str


class HostAlive(Refused):
    """A host is to be released, and its worker still speaks."""

    code: ClassVar[str] = "fleet-host-alive"
    template: ClassVar[str] = "the worker of {host} is connected to the database"
    hint: ClassVar[str] = (
        "`chainmerge fleet drain {host} --now` stops its merges at a safe point; release only "
        "what cannot write any more"
    )
    explanation: ClassVar[str] = (
        "Releasing a host frees what its merges hold, so that others may start. That is only safe "
        "if the host is switched off, or cut off from its storage."
    )
    host: str
