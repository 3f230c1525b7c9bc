"""What a site needs to take part, as a script that starts its SuperNode."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from fslora.deploy.bundle import OFFLINE
from fslora.deploy.settings import SiteSettings
from fslora.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class Link:
    """How a site reaches the server."""

    superlink: str
    """HOST:PORT."""
    certificates: Path | None = None
    """Whoever signed the server's certificate; None: without TLS."""
    key: Path | None = None
    """The site's own key."""
    port: int = 9094
    """Of the SuperNode's own interface, on loopback; each SuperNode of one machine needs another one."""


def write_script(site: SiteSettings, link: Link, to: Path) -> None:
    """Writes the script, for the site's operator to read and start.

    Raises:
        ConfigError: What it is to say does not fit together.
        ArtifactError: It cannot be written, or is there already.
    """
    if not site.members:
        raise ConfigError("--clients names no client")
    if link.key is not None and link.certificates is None:
        raise ConfigError("--key needs TLS; give --root-certificates too")
    host, colon, port = link.superlink.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ConfigError(f"--superlink is {link.superlink!r}; write HOST:PORT, e.g. fl.example.org:8443")
    for path, option in ((link.certificates, "--root-certificates"), (link.key, "--key")):
        if path is not None and not path.is_file():
            raise ConfigError(f"{option} {path} is no file")
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(script(site, link))
        to.chmod(0o700)
    except FileExistsError:
        raise ArtifactError(f"{to} is there already; remove it, or choose another file with --out") from None
    except OSError as error:
        raise ArtifactError(f"{to} cannot be written: {error}") from None


def script(site: SiteSettings, link: Link) -> str:
    """Returns the text of the script."""
    words = ["flower-supernode", "--superlink", link.superlink, "--port", str(link.port)]
    words += ["--node-config", site.to_node_config()]
    if link.certificates is None:
        words.append("--insecure")
    else:
        words += ["--root-certificates", str(link.certificates.resolve())]
    if link.key is not None:
        words += ["--auth-supernode-private-key", str(link.key.resolve())]
    exports = "\n".join(f"export {name}={value}" for name, value in OFFLINE.items())
    return f"""#!/bin/sh
# Site {site.site} of a federation, written by `fslora deploy client-config`. It dials out; nothing dials in.
# What leaves this machine: the site's name, and of each client its id, rank, numbers of examples, updates, losses,
# and scores.
{exports}
exec {shlex.join(words)}
"""
