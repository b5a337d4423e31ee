"""A private Slurm of two nodes on this machine: real daemons, each node with host name and processes of its own.

``python -m tests.cluster.slurm`` starts one and a shell to use it from; the cluster ends with the shell.
"""

import getpass
import os
import shutil
import socket
import string
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
TEMPLATE = Path(__file__).with_name("slurm.conf")


class Cluster:
    """Two nodes, `n1` and `n2`, with 64 CPUs and 8 GPUs each that exist for the scheduler only."""

    def __init__(self) -> None:
        # munge wants a folder that others may enter, and a short path for its socket: pytest's folders are neither
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> "Cluster":
        """Start the daemons and wait until both nodes are idle."""
        for name in ("munge", "state", "spool", "log", "devices"):
            (self.folder / name).mkdir()
        self._start_munge()
        self._write_settings()
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.state_of_nodes() == ["idle", "idle"], 60, lambda: f"nodes are not idle\n{self.log()}")
        return self

    def stop(self) -> None:
        """Kill everything that belongs to the cluster."""
        for name in reversed(self.daemons):
            self.daemons[name].kill()
            self.daemons[name].wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Boot a node: namespaces with its own host name, processes and /etc/hosts, and slurmd in them."""
        own_user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        boot = 'hostname "$0" && mount --bind "$1/hosts" /etc/hosts && { slurmd -D -N "$0" -f "$1/slurm.conf" & wait; }'
        self._daemon(node, "unshare", *own_user, "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child",
                     "--mount-proc", "sh", "-c", boot, node, str(self.folder))  # fmt: skip

    def kill_node(self, node: str) -> None:
        """Switch a node off: every process on it is gone at once, slurmd too."""
        self.daemons[node].kill()
        self.daemons[node].wait()

    def __call__(self, *command: str, **options: Any) -> str:
        """Run a Slurm command and return what it prints."""
        options = {"env": self.environment, **options}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def ask(self, *command: str) -> str:
        """What a Slurm command prints; nothing where a busy controller does not answer: ask again."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout.strip()

    def state_of_nodes(self) -> list[str]:
        """State of each node, as sinfo calls it."""
        return self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()

    def state(self, job: str) -> str:
        """State of a job, as squeue calls it; a word for each task of an array."""
        return " ".join(sorted(set(self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split())))

    def wait(self, job: str, timeout_s: float = 600) -> str:
        """Wait until a job has ended and return its state (`sbatch --wait` looks only every 32 s)."""
        wait_until(lambda: self.state(job) in ENDED, timeout_s, lambda: f"job {job} is {self.state(job)}\n{self.log()}")
        return self.state(job)

    def log(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in (self.folder / "log").iterdir())

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").touch(0o600)
        (folder / "key").write_bytes(os.urandom(1024))
        files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *files)
        wait_until((folder / "socket").exists, 30, lambda: f"munged did not start\n{self.log()}")

    def _write_settings(self) -> None:
        host = socket.gethostname().split(".")[0]
        first = free_ports(3)
        values = {"host": host, "user": getpass.getuser(), "folder": self.folder, "controller_port": first,
                  "node_ports": f"{first + 1}-{first + 2}"}  # fmt: skip
        (self.folder / "slurm.conf").write_text(string.Template(TEMPLATE.read_text()).substitute(values))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # never used, but v2 must not be probed
        for number in range(8):  # slurmd wants character devices
            (self.folder / "devices" / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/devices/gpu[0-7]\n")
        names = ["localhost", host, *NODES]
        (self.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names) + "::1 localhost\n")

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("a") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


def free_ports(count: int) -> int:
    """The first of so many neighbouring TCP ports that nobody uses."""
    for _ in range(100):
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        taken = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(taken):
                each.bind(("127.0.0.1", port + offset))
            return port
        except (OSError, OverflowError):
            continue
        finally:
            for each in taken:
                each.close()
    raise AssertionError("no free ports")


def wait_until(reached: Callable[[], bool], timeout_s: float, otherwise: Callable[[], str]) -> None:
    """Poll a condition."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)


def main() -> None:
    """Start a cluster, open a shell in it and stop it afterwards."""
    cluster = Cluster()
    try:
        cluster.start()
        print(f"Slurm with the nodes {', '.join(NODES)}: sbatch, srun and squeue work in this shell; leave it to stop.")
        subprocess.run([os.environ.get("SHELL", "sh")], env=cluster.environment, check=False)
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
