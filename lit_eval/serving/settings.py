"""Settings of the server. Standard library only, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerSettings:
    """Address and limits of the server. The fields are flags of scripts/serve.py."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than a loopback address requires an API key."""
    port: int = 8000
    """TCP port; 0 picks a free one."""
    max_new_tokens: int = 512
    """Maximum new tokens per request. A larger max_tokens gets status 400."""
    max_waiting: int = 16
    """Maximum requests queued behind the running one. Further ones get status 429."""
    max_body_bytes: int = 1 << 20
    """Maximum size of a request body in bytes. Larger ones get status 413."""
    timeout_s: float = 120.0
    """Seconds for a request to arrive (else status 408), and then to be answered, time in the queue included (else
    503)."""

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("max_new_tokens", 1), ("max_waiting", 0), ("max_body_bytes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}")
        if self.port > 65535:
            raise ValueError(f"--port {self.port} must be at most 65535")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"--timeout_s {self.timeout_s} must be a positive number of seconds")


def check_key(settings: ServerSettings, key: str | None) -> None:
    """Raise ValueError if the server would be open to the network without a key, or if a header cannot carry the
    key."""
    if key is None and settings.host not in LOOPBACK:
        raise ValueError(
            f"--host {settings.host} accepts connections from other machines, which requires an API key: set "
            "LLAMMLEIN_API_KEY or give --api_key_file FILE"
        )
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise ValueError("the API key must consist of printable ASCII characters without spaces")
