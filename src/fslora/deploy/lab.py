"""A whole federation on this machine: a SuperLink and SuperNodes as processes of their own, on the loopback interface.

Each starts further processes in sessions of their own, which may outlive it: they are found as its children, or by the
folder that they were told to keep their files in. A keeper does so where this process is killed.
"""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import tomlkit

from fslora.deploy.bundle import command, environment, flwr
from fslora.deploy.keeper import sweep
from fslora.deploy.settings import SiteSettings
from fslora.errors import TrainingError
from fslora.processes import THREADS, Child, threads_each

CONNECTION = "lab"
HOST = "127.0.0.1"


class Lab:
    """A SuperLink and its SuperNodes; leaving the context ends them all.

    Args:
        sites: What each SuperNode is told.
        logs: Where their output goes.
        secure: With TLS, and with a key for each site.
    """

    def __init__(self, sites: Mapping[str, SiteSettings], logs: Path, secure: bool) -> None:
        self.sites = sites
        self.logs = logs
        self.secure = secure
        self.home = Path()
        self.port = 0
        self.keeper: Child | None = None
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        """By name: 'superlink', and the sites'."""

    def __enter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.home = Path(tempfile.mkdtemp(prefix="fslora-lab-"))
        try:
            self.keeper = Child.start("fslora.deploy.keeper", 1, str(self.home))
            self._start_server()
            for name in self.sites:
                self._register(name)
                self.start_site(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process, sites first, and removes what they kept for themselves."""
        for name in [*(name for name in self.processes if name != "superlink"), "superlink"]:
            self.stop(name)
        sweep(self.home)
        if self.keeper:
            self.keeper.stop()

    def start_site(self, name: str) -> None:
        """Starts a site's SuperNode; it comes back under its own name."""
        args = ["--superlink", f"{HOST}:{self.port}", "--port", str(free_port())]
        args += ["--node-config", self.sites[name].to_node_config()]
        if self.secure:
            args += ["--root-certificates", str(self.home / "certificates" / "ca.crt")]
            args += ["--auth-supernode-private-key", str(self.home / "certificates" / name)]
        else:
            args.append("--insecure")
        self._start(name, [command("flower-supernode"), *args])

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM, seconds: float = 10.0) -> None:
        """Ends a process and all that it started."""
        process = self.processes.pop(name, None)
        if process is None:
            return
        started = family(process.pid)
        with suppress(psutil.Error):
            psutil.Process(process.pid).send_signal(how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        for each in started:
            with suppress(psutil.Error):
                each.kill()
        process.wait()

    def check(self) -> None:
        """Raises TrainingError where the SuperLink is gone."""
        if self.processes["superlink"].poll() is not None:
            raise TrainingError(f"the SuperLink has ended: {self._last_words('superlink')}")

    def _start_server(self) -> None:
        self.port = free_port()
        args = ["--host", HOST, "--port", str(self.port), "--disable-runtime-dependency-installation"]
        connection: dict[str, object] = {"address": f"{HOST}:{self.port}"}
        if self.secure:
            from fslora.deploy.certificates import write_authority

            folder = self.home / "certificates"
            write_authority(folder)
            args += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.pem")]
            args += ["--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"]
            connection["root-certificates"] = str(folder / "ca.crt")
        else:
            args.append("--insecure")
            connection["insecure"] = True
        document = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        (self.home / "config.toml").write_text(tomlkit.dumps(document), encoding="utf-8")
        self._start("superlink", [command("flower-superlink"), *args])
        self._wait_for_health()

    def _register(self, name: str) -> None:
        if self.secure:
            from fslora.deploy.certificates import write_site_key

            key = self.home / "certificates" / name
            write_site_key(key)
            flwr(["supernode", "register", f"{key}.pub", CONNECTION, "--name", name], self.home)

    def _start(self, name: str, arguments: list[str]) -> None:
        # Looking for work four times a second instead of once: a round is mostly waiting otherwise.
        own = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}
        if name in self.sites:
            own |= dict.fromkeys(THREADS, str(threads_each(len(self.sites))))
        with (self.logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                arguments,
                env={**environment(self.home), **own},
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_for_health(self, seconds: float = 60.0) -> None:
        context = None
        if self.secure:
            context = ssl.create_default_context(cafile=str(self.home / "certificates" / "ca.crt"))
        url, until = f"{'https' if self.secure else 'http'}://{HOST}:{self.port}/health", time.monotonic() + seconds
        while True:
            self.check()
            with suppress(OSError), urllib.request.urlopen(url, timeout=5, context=context) as answer:
                if answer.status == 200:
                    return
            if time.monotonic() > until:
                raise TrainingError(f"the SuperLink did not start in {seconds:g} s: {self._last_words('superlink')}")
            time.sleep(0.2)

    def _last_words(self, name: str) -> str:
        path = self.logs / f"{name}.log"
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
        return f"{lines[-1] if lines else 'it said nothing'} (all in {path})"


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def family(number: int) -> list[psutil.Process]:
    """Returns a process and all that it has started, and those have started."""
    try:
        process = psutil.Process(number)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []
