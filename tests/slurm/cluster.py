"""A SLURM cluster on this machine: each node has its own network, host name, mounts and daemons.

It needs Linux, root, and the packages that `make slurm` installs.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

NETWORK = "10.79.0"
DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "ip", "nsenter", "unshare")

CONFIG = """\
ClusterName=test
SlurmctldHost=head({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/head.pid
SlurmctldLogFile={folder}/head.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout=20
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 State=UP
"""


class Cluster:
    """A cluster, which runs from `up` to `down`.

    Args:
        folder: for its files; an absolute path that is short, because sockets are in it.
        nodes: number of nodes, named node1, node2, ...
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.prefix = f"zc{os.getpid() % 100000}"
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def up(self) -> None:
        """Start all daemons, and wait until the nodes are idle."""
        self.folder.chmod(0o755)  # munge requires it
        munge = self.folder / "munge"
        for name in (munge, self.folder / "state"):
            name.mkdir(mode=0o755)
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        _run("munged", f"--socket={munge}/socket", f"--key-file={key}", f"--log-file={munge}/log",
             f"--pid-file={self.folder}/munged.pid", f"--seed-file={munge}/seed")  # fmt: skip
        address = {name: f"{NETWORK}.{10 + number}" for number, name in enumerate(self.names, 1)}
        hosts = ["127.0.0.1 localhost", f"{NETWORK}.1 head", *(f"{ip} {name}" for name, ip in address.items())]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        nodes = "\n".join(f"NodeName={n} NodeAddr={ip} CPUs=16 RealMemory=64000" for n, ip in address.items())
        config = CONFIG.format(network=NETWORK, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(config)
        _run("ip", "link", "add", f"{self.prefix}br", "type", "bridge")
        _run("ip", "address", "add", f"{NETWORK}.1/24", "dev", f"{self.prefix}br")
        _run("ip", "link", "set", f"{self.prefix}br", "up")
        for name, ip in address.items():
            space, link = f"{self.prefix}{name}", self.link(name)
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", link, "master", f"{self.prefix}br", "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "address", "add", f"{ip}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
        self._start("head", [], "slurmctld")
        for name in self.names:
            inside = ["nsenter", f"--net=/run/netns/{self.prefix}{name}"]
            self._start(name, inside, f"slurmd -N {name}")
        self.wait(lambda: self.ask("sinfo", "-hN", "-t", "idle").count("node") >= len(self.names), 30)

    def _start(self, host: str, inside: list[str], daemon: str) -> None:
        shell = f"hostname {host} && mount --bind {self.folder}/hosts /etc/hosts && exec {daemon}"
        _run(*inside, "unshare", "--uts", "--mount", "sh", "-c", shell, env=self.environment)

    def link(self, node: str) -> str:
        """Return the name of a node's network link on this machine."""
        return f"{self.prefix}{node.removeprefix('node')}"

    def cut_off(self, node: str) -> None:
        """Disconnect a node from the network."""
        _run("ip", "link", "set", self.link(node), "down")

    def reconnect(self, node: str) -> None:
        """Connect a node to the network again."""
        _run("ip", "link", "set", self.link(node), "up")

    def ask(self, *command: str) -> str:
        """Return what a SLURM command prints."""
        return _run(*command, env=self.environment)

    def submit(self, *arguments: str, cwd: Path, **env: str) -> str:
        """Submit a job, and return its number."""
        return _run("sbatch", "--parsable", *arguments, env={**self.environment, **env}, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return SLURM's record of a job."""
        words = self.ask("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finished(self, number: str) -> bool:
        """Whether a job will not run again."""
        return self.job(number)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

    def wait(self, done, seconds: float) -> None:
        """Wait until `done()`, or raise `TimeoutError`."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(self.ask("squeue", "-l") + self.ask("sinfo", "-Nl"))
            time.sleep(0.2)

    def down(self) -> None:
        """End all jobs and daemons, and remove the networks."""
        if (self.folder / "head.pid").exists():
            _run("scancel", "--user=root", env=self.environment, check=False)
            time.sleep(1)
        files = [self.folder / f"{name}.pid" for name in (*self.names, "head", "munged")]
        daemons = [file.read_text().strip() for file in files if file.exists()]
        for pid in daemons:
            _run("kill", pid, check=False)
        deadline = time.monotonic() + 10
        while any(Path("/proc", pid).exists() for pid in daemons) and time.monotonic() < deadline:
            time.sleep(0.1)
        for name in self.names:
            space = f"{self.prefix}{name}"
            for pid in _run("ip", "netns", "pids", space, check=False).split():
                _run("kill", "-9", pid, check=False)
            _run("ip", "netns", "delete", space, check=False)
            _run("ip", "link", "delete", self.link(name), check=False)
        _run("ip", "link", "delete", f"{self.prefix}br", check=False)


def missing() -> str | None:
    """Return why no cluster can run here; `None` if one can."""
    not_installed = [name for name in DAEMONS if shutil.which(name) is None]
    if not_installed:
        return f"{', '.join(not_installed)} not installed: make slurm installs them"
    if os.geteuid():
        return "it needs root"
    probe = subprocess.run(["ip", "link", "add", "zcprobe", "type", "bridge"], capture_output=True, text=True)
    subprocess.run(["ip", "link", "delete", "zcprobe"], capture_output=True)
    return f"networks cannot be created here: {probe.stderr.strip()}" if probe.returncode else None


def _run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None, check: bool = True) -> str:
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout
