"""An OCI registry on loopback that stands in for a public one. Needs Debian's docker-registry and skopeo."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("docker-registry", "skopeo")


def missing_programs() -> list[str]:
    """The programs that are not installed; without them there is no registry."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass
class Registry:
    """Started by `start`, on a port that was free; all that it holds lies in one folder. It speaks HTTP, not HTTPS."""

    folder: Path
    address: str = ""
    """host:port, once it is started."""
    server: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start it and wait until it listens."""
        configuration = self.folder / "registry.yml"
        storage = f"storage: {{filesystem: {{rootdirectory: '{self.folder / 'blobs'}'}}, delete: {{enabled: true}}}}"
        configuration.write_text(f"version: 0.1\n{storage}\nhttp: {{addr: '127.0.0.1:0'}}\n")
        log = self.folder / "registry.log"
        environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
        with log.open("wb") as output:
            argv = ["docker-registry", "serve", str(configuration)]
            self.server.append(
                subprocess.Popen(argv, stdout=output, stderr=output, env=environment, start_new_session=True)
            )
        deadline = time.monotonic() + 60
        while not (found := re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text())):
            assert time.monotonic() < deadline and self.server[0].poll() is None, log.read_text()
            time.sleep(0.05)
        self.address = found[1]

    def push(self, layout: Path, name: str) -> str:
        """Copy the image of an OCI layout to the registry as `name` (repository:tag); returns its manifest's digest."""
        digest = self.folder / "digest"
        target = f"docker://{self.address}/{name}"
        argv = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        subprocess.run([*argv, f"--digestfile={digest}", f"oci:{layout}", target], check=True, timeout=300)
        return digest.read_text().strip()

    def stop(self) -> None:
        """End it."""
        for server in self.server:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
