"""Hosts on one machine: network namespaces with own names and a link that can be limited, reached without ssh."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Hosts:
    """Hosts joined by a bridge; all of it is gone afterwards."""

    def __init__(self, folder: Path, count: int = 2):
        tag = f"{os.getpid() % 100000:x}"
        self.names = [f"dt{tag}n{index}" for index in range(1, count + 1)]
        self.bridge = f"dt{tag}br"
        self.net = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self.addresses = [f"{self.net}.{index}" for index in range(1, count + 1)]
        self.agent = folder / "agent.sh"

    @property
    def options(self) -> list[str]:
        """Words for mpirun: start on both hosts, one rank each, over their network."""
        network = f"{self.net}.0/24"
        return ["--mca", "plm_rsh_agent", str(self.agent), "--mca", "oob_tcp_if_include", network, "--mca",
                "btl_tcp_if_include", network, "--map-by", "node", "--host", ",".join(self.names)]  # fmt: skip

    def start(self, rank: int, command: list[str], port: int, **options: Any) -> subprocess.Popen:
        """Start a command on a host as the one rank there, as a launcher would."""
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(self.names)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.addresses[0], "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        return subprocess.Popen(self.on(rank, shlex.join(command)), env=environment, text=True, **options)

    def on(self, host: int, command: str) -> list[str]:
        """Words that run a shell's command on a host."""
        name = self.names[host]
        named = ["unshare", "--uts", "sh", "-c", f"hostname {name}; exec {command}"]
        return ["ip", "netns", "exec", name, *named]

    def cut(self, host: int) -> None:
        """Take a host's link down."""
        run("ip", "link", "set", f"v{self.names[host]}", "down")

    def join(self, host: int) -> None:
        """Bring it up again."""
        run("ip", "link", "set", f"v{self.names[host]}", "up")

    def limit(self, rate: str | None) -> None:
        """Let each host send and receive at most so much, as tc writes it ("100mbit"), or as much as it can."""
        for name in self.names:
            for command in (["tc", "-n", name, "qdisc", "del", "dev", "eth0", "root"],
                            ["tc", "qdisc", "del", "dev", f"v{name}", "root"]):  # fmt: skip
                subprocess.run(command, check=False, capture_output=True)
            if rate is not None:
                burst = "256kb" if rate.endswith("gbit") else "64kb"  # some milliseconds' worth, or it is not reached
                limit = ["root", "tbf", "rate", rate, "burst", burst, "latency", "100ms"]
                run("tc", "-n", name, "qdisc", "add", "dev", "eth0", *limit)
                run("tc", "qdisc", "add", "dev", f"v{name}", *limit)

    def __enter__(self) -> "Hosts":
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _build(self) -> None:
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.net}.254/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        pairs = list(zip(self.addresses, self.names, strict=True))
        for address, name in pairs:
            run("ip", "netns", "add", name)
            run("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", f"v{name}", "master", self.bridge, "up")
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            hosts = Path("/etc/netns") / name / "hosts"  # ip netns exec puts it over /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in pairs))
        # In the place of ssh: the first word is the host, the others the command.
        self.agent.write_text('#!/bin/sh\nhost=$1; shift\nexec ip netns exec "$host" unshare --uts '
                              'sh -c "hostname $host; $*"\n')  # fmt: skip
        self.agent.chmod(0o755)

    def _remove(self) -> None:
        for name in self.names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in left.stdout.split():
                subprocess.run(["kill", "-9", pid], check=False)
            for command in (("netns", "del", name), ("link", "del", f"v{name}")):
                subprocess.run(["ip", *command], check=False, capture_output=True)
            hosts = Path("/etc/netns") / name / "hosts"
            hosts.unlink(missing_ok=True)
            if hosts.parent.exists():
                hosts.parent.rmdir()
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
