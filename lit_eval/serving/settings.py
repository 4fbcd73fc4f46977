"""The settings of the server. Standard library only, for a quick --help."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens, and its limits. The fields are flags of scripts/serve.py."""

    host: str = "127.0.0.1"
    """Address to listen on; beyond the loopback an API key is required."""
    port: int = 8000
    """0: any free port."""
    max_new_tokens: int = 512
    """A request may ask for at most so many."""
    max_waiting: int = 16
    """Requests that may wait behind the one being answered; another gets status 429."""
    max_body_bytes: int = 1 << 20
    """Larger bodies get status 413."""
    timeout_s: float = 120.0
    """Seconds after which a request that waits or is being answered is given up with status 503."""

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("max_new_tokens", 1), ("max_waiting", 0), ("max_body_bytes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {least} is needed")
        if self.port > 65535:
            raise ValueError(f"--port {self.port}: at most 65535 is possible")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"--timeout_s {self.timeout_s}: give seconds above 0")


def check_key(settings: ServerSettings, key: str | None) -> None:
    """Raise ValueError for a server that anyone on the network could use, and for a key that no header can hold."""
    if key is None and settings.host not in LOOPBACK:
        raise ValueError(
            f"--host {settings.host} lets other machines in: set LLAMMLEIN_API_KEY, or give --api_key_file FILE"
        )
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise ValueError("the API key must be of printable ASCII characters without spaces, and not empty")
