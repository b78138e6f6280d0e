"""A private Slurm on this machine: two nodes of eight GPUs that are no GPUs, its own ports, no systemd, no accounting.

A job that takes more memory than it asked for is killed: by the kernel where this user may make memory cgroups (root,
cgroup v1), elsewhere by Slurm, which looks every second.
Needs Debian's slurmctld, slurmd, slurm-client and munge. Everything lives in one folder and ends with `stop`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ordinary_user import OrdinaryUser

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2")
GPUS = 8
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
"""Where cgroup v1 has them; Slurm 22.05 needs systemd for v2."""


def missing_programs() -> list[str]:
    """The programs that are not installed; without them there is no cluster."""
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


@dataclass
class MiniSlurm:
    """Started by `start`; `environment` is what a user's shell on its login node has set."""

    folder: Path
    user: OrdinaryUser | None = None
    """Who runs the daemons, and so the jobs; None: who runs the tests."""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By name: munged, slurmctld, and each node's own."""

    @property
    def has_groups(self) -> bool:
        """Whether the kernel holds jobs to the memory that they asked for."""
        return self.user is None and os.getuid() == 0 and os.access(MEMORY_GROUPS / "memory.oom_control", os.W_OK)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start munged, the controller and a daemon for each node, and wait until both nodes are idle."""
        user = self.user.name if self.user else Path("/proc/self").owner()
        _write_configuration(self.folder, user, self.has_groups)
        if self.user:
            self.user.own(self.folder)
        self.start_daemon("munged")
        _wait((self.folder / "munge" / "socket").exists, "munged", self.folder)
        for name in ("slurmctld", *NODES):
            self.start_daemon(name)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until both nodes are idle."""
        _wait(
            lambda: self.command("sinfo", "-h", "-N", "-p", "gpu", "-o", "%t").split() == ["idle"] * 2,
            "nodes",
            self.folder,
        )

    def empty(self) -> bool:
        """Whether no job waits or runs. A controller that does not answer says nothing, not even the heading."""
        return len(self.command("squeue").splitlines()) == 1

    def job_ids(self, *options: str) -> list[str]:
        """The jobs in the queue, those that squeue's options choose, in the order in which they were submitted."""
        ids = self.command("squeue", "-h", "--array", "-o", "%i", *options).split()
        return sorted(ids, key=lambda job: [int(number) for number in job.split("_")])

    def clear(self, spared: Collection[str] = ()) -> None:
        """Make it as it was at the start, where it is not: all daemons run, no jobs are left but the spared ones, no
        node is taken out."""
        for name, daemon in self.daemons.items():
            if daemon.poll() is not None:
                self.start_daemon(name)
        _wait(lambda: self.command("squeue"), "the controller", self.folder)
        self._cancel(spared)
        out = set(self.command("sinfo", "-h", "-N", "-o", "%N", "-t", "down,drain,fail").split())
        for name in out:
            self.command("scontrol", "update", f"NodeName={name}", "State=RESUME")
        if out:
            self.wait_for_nodes()

    def stop(self) -> None:
        """Cancel what runs, and end the daemons and what is left of the jobs of nodes that were killed."""
        try:
            self._cancel()
        finally:
            for daemon in reversed(self.daemons.values()):
                daemon.terminate()
            for daemon in self.daemons.values():
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
            self.kill_processes(lambda _, environment: True)
            if self.has_groups:
                _remove_groups(_group(self.folder))

    def kill_processes(self, wanted: Callable[[bytes, set[bytes]], bool]) -> None:
        """Kill those of this cluster's processes, daemons, steps and jobs, with such a command line and environment."""
        mine = {f"{name}={value}".encode() for name, value in self.environment.items()}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = set((entry / "environ").read_bytes().split(b"\0"))
                if mine <= environment and wanted((entry / "cmdline").read_bytes(), environment):
                    os.kill(int(entry.name), signal.SIGKILL)

    def _cancel(self, spared: Collection[str] = ()) -> None:
        if left := set(self.job_ids()).difference(spared):
            self.command("scancel", *left)
            _wait(lambda: not left.intersection(self.job_ids()), "jobs to end", self.folder)

    def command(self, *argv: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            self._as_user(argv), env=self._whole_environment(), capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout

    def _as_user(self, argv: Sequence[str]) -> list[str]:
        return self.user.argv(argv) if self.user else list(argv)

    def _whole_environment(self) -> dict[str, str]:
        return {**(self.user.environment() if self.user else os.environ), **self.environment}

    def start_daemon(self, name: str) -> None:
        """Start munged, the controller, or a node's daemon, for the first time or again."""
        with (self.folder / f"{name}.out").open("ab") as log:
            program, *arguments = _daemon_argv(self.folder, name)
            path = shutil.which(program, path=_search_path())
            assert path is not None
            command = self._as_user([path, *arguments])
            environment = self._whole_environment()
            self.daemons[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def stop_daemon(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a daemon and wait until it is gone; a node's jobs go on without it."""
        self.daemons[name].send_signal(how)
        self.daemons[name].wait(30)


def _daemon_argv(folder: Path, name: str) -> list[str]:
    configuration, munge = ["-D", "-f", str(folder / "slurm.conf")], folder / "munge"
    if name == "munged":
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return ["munged", "--foreground", "--force", *(f"--{key}={munge / file}" for key, file in files.items())]
    return ["slurmctld", *configuration] if name == "slurmctld" else ["slurmd", "-N", name, *configuration]


def _write_configuration(folder: Path, user: str, has_groups: bool) -> None:
    for name in ("munge", "state", "spool/n1", "spool/n2", "gpu"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for index in range(GPUS):  # each must be a character device with a name of its own
        (folder / "gpu" / f"nvidia{index}").symlink_to("/dev/null")
    host = socket.gethostname().split(".")[0]
    control, first, second = _free_ports(3)
    (folder / "slurm.conf").write_text(
        f"""
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin={"task/cgroup" if has_groups else "task/none"}
{"JobAcctGatherType=jobacct_gather/none" if has_groups else _MEMORY_BY_SLURM}
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=64 RealMemory=512000 Gres=gpu:a100:{GPUS} State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second}
PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
""".lstrip()
    )
    if has_groups:
        # A group of its own: other private clusters on this machine have nodes and jobs of the same names.
        _group(folder).mkdir()
        (folder / "cgroup").mkdir()
        (folder / "cgroup" / "memory").symlink_to(_group(folder))
        (folder / "cgroup.conf").write_text(
            f"CgroupMountpoint={folder}/cgroup\nCgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\n"
        )
    (folder / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName=n1,n2 Name=gpu Type=a100 File={folder}/gpu/nvidia[0-{GPUS - 1}]\n"
    )


_MEMORY_BY_SLURM = """
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
""".strip()


def _group(folder: Path) -> Path:
    return MEMORY_GROUPS / f"mini-slurm-{folder.name}-{os.getpid()}"


def _remove_groups(top: Path) -> None:
    """Slurm leaves the groups of its nodes and users behind. One whose last process is still going away is left."""
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _wait(condition: Callable[[], object], what: str, folder: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the private Slurm: waited {timeout_s:.0f} s for {what}; see {folder}"
        time.sleep(0.1)
