"""Two hosts on one machine: each has a network, a name, processes and shared memory of its own; a cable is between.

A host is what `unshare` makes: namespaces that live as long as their first process, which ends with its standard input.
So nothing can be left behind, not even by a test run that is killed: the kernel then ends every process of the host and
takes its network apart. Files are shared, as the home directories of a cluster are. ::

    with two_hosts(tmp_path) as hosts:
        process = hosts[1].start(["hostname"])          # node1, a Popen
        hosts[1].cut()                                  # nothing comes through any more
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
INTERFACE = "eth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # seen by nobody else: each pair of hosts has networks of its own
SPACES = ["--net", "--uts", "--mount", "--pid"]
# $1 is the name, $2 the folder with `hosts`. The new /run is for sshd, which insists on a folder there.
INIT = """set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
cat"""
SSHD = """ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
SetEnv PATH={path}
"""
SSH = """IdentityFile {folder}/key
IdentitiesOnly yes
BatchMode yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
ConnectTimeout 5
"""


@dataclass
class Host:
    """One of the two."""

    name: str
    address: str
    folder: Path
    pid: int  # of its first process, as the test sees it
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def inside(self, command: list[str]) -> list[str]:
        """The command that runs `command` on this host, in `folder`."""
        return ["nsenter", f"--target={self.pid}", *SPACES, "env", f"--chdir={self.folder}", *command]

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        """A process on this host; its output, errors too, is the pipe `stdout`."""
        process = subprocess.Popen(
            self.inside(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment() | environment,
        )
        self.started.append(process)
        return process

    def environment(self) -> dict[str, str]:
        """What a login on this host would have, and this Python first in PATH."""
        kept = {k: os.environ[k] for k in ("HOME", "LANG", "TORCH_EXTENSIONS_DIR") if k in os.environ}
        return kept | {
            "PATH": os.pathsep.join([str(self.folder / "bin"), str(BIN), os.defpath, "/usr/sbin", "/sbin"]),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": INTERFACE,
        }

    def run(self, *command: str) -> str:
        """The output of a command that must succeed at once."""
        process = self.start(list(command))
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 0, f"{command} on {self.name}: {output}"
        return output

    def cut(self) -> None:
        """Take the network away, without a word to the other side."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """Give it back."""
        self.run("ip", "link", "set", INTERFACE, "up")


def why_not() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"there is no program {program} (Debian: util-linux, iproute2)"
    probe = ["unshare", *SPACES, "--fork", "--mount-proc", *"ip link add veth0 type veth peer name veth1".split()]
    result = subprocess.run(probe, capture_output=True, text=True, timeout=20)
    return "" if result.returncode == 0 else f"no namespaces here (root is needed): {result.stderr.strip()}"


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """node0 and node1, joined by a cable; skips the test where the machine refuses."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    names = ("node0", "node1")
    lines = [f"{a} {n}\n" for n, a in zip(names, ADDRESSES, strict=True)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines), encoding="utf-8")
    hosts: list[Host] = []
    with contextlib.ExitStack() as stack:
        for name, address in zip(names, ADDRESSES, strict=True):
            first = subprocess.Popen(
                [
                    "unshare",
                    *SPACES,
                    "--fork",
                    "--kill-child",
                    "--mount-proc",
                    "sh",
                    "-c",
                    INIT,
                    "sh",
                    name,
                    str(folder),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(_end, first)
            assert first.stdout is not None
            answer = first.stdout.readline()
            assert answer == "ready\n", answer + first.stdout.read()
            host = Host(name, address, folder, psutil.Process(first.pid).children()[0].pid)
            stack.callback(_reap, host)
            hosts.append(host)
        a, b = hosts
        cable = f"ip link add {INTERFACE} type veth peer name {INTERFACE} netns {b.pid}"
        # From outside the process namespace, in which the number of the other host's process means something.
        subprocess.run(["nsenter", f"--target={a.pid}", "--net", *cable.split()], check=True, timeout=20)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.mend()
        yield hosts


def start_sshd(hosts: list[Host]) -> None:
    """Let the hosts reach each other by `ssh`, with a key that lives as long as the test; or skip the test."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("there is no sshd or no ssh (Debian: openssh-server, openssh-client)")
    folder = hosts[0].folder
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=20)
    known = (folder / "host_key.pub").read_text(encoding="utf-8")
    lines = [f"{host.name},{host.address} {known}" for host in hosts]
    (folder / "known_hosts").write_text("".join(lines), encoding="utf-8")
    (folder / "ssh_config").write_text(SSH.format(folder=folder), encoding="utf-8")
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n', encoding="utf-8")
    ssh.chmod(0o755)
    for host in hosts:
        path = host.environment()["PATH"]
        config = folder / f"sshd_{host.name}"
        config.write_text(SSHD.format(address=host.address, folder=folder, path=path), encoding="utf-8")
        host.start([sshd, "-D", "-e", "-f", str(config)])
    for host in hosts:
        limit = time.monotonic() + 10
        while (process := hosts[0].start(["ssh", host.name, "hostname"])).wait(20) != 0:
            assert process.stdout is not None
            assert time.monotonic() < limit, process.stdout.read()
            time.sleep(0.1)
        assert process.stdout is not None and process.stdout.read() == f"{host.name}\n"


def _end(first: subprocess.Popen[str]) -> None:
    first.kill()  # its child, the first process of the host, goes with it, and with that all others
    first.wait()
    assert first.stdin is not None and first.stdout is not None
    first.stdin.close()
    first.stdout.close()


def _reap(host: Host) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(host.pid, 9)
    for process in host.started:
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()
