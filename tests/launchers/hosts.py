"""Two hosts on one machine: network namespaces with own names, reached by Open MPI without ssh."""

import os
import subprocess
from pathlib import Path


class Hosts:
    """Two hosts joined by a bridge; all of it is gone afterwards."""

    def __init__(self, folder: Path):
        tag = f"{os.getpid() % 100000:x}"
        self.names = [f"dt{tag}n{index}" for index in (1, 2)]
        self.bridge = f"dt{tag}br"
        self.net = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self.addresses = [f"{self.net}.{index}" for index in (1, 2)]
        self.agent = folder / "agent.sh"

    @property
    def options(self) -> list[str]:
        """Words for mpirun: start on both hosts, one rank each, over their network."""
        network = f"{self.net}.0/24"
        return ["--mca", "plm_rsh_agent", str(self.agent), "--mca", "oob_tcp_if_include", network, "--mca",
                "btl_tcp_if_include", network, "--map-by", "node", "--host", ",".join(self.names)]  # fmt: skip

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
