"""The server file: what `genssl serve-generator` hosts, where, and within which limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from genssl.config.address import check_address, is_local
from genssl.config.base import BUCKETS, Buckets, ComponentConfig, Kind, Section
from genssl.config.limits import LimitsConfig


class StoreConfig(Section):
    """A store on the server's disk: every variant made is written, and none is made twice."""

    path: Path
    max_bytes: int = Field(2**40, ge=2**20, description="the store grows to at most this size, then stops growing")


class MetricsConfig(Section):
    """Prometheus metrics, on a port of their own."""

    address: str = Field("127.0.0.1:9464", description="host:port; port 0: any free one")

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        if value.startswith("unix:"):
            raise ValueError("metrics are served over TCP; give host:port")
        return check_address(value)


class TLSConfig(Section):
    """Encryption; with `client_ca` also proof of who the client is (mTLS). Files that are replaced are read anew."""

    certificate: Path = Field(
        description="PEM, the chain, the server's own certificate first; for an RSA key of 2048 bits or more, or an "
        "ECDSA key on P-256 or P-384"
    )
    key: Path = Field(description="PEM")
    client_ca: Path | None = Field(None, description="PEM; clients must show a certificate signed by one of these")


class TokenConfig(Section):
    """A bearer token, from a file (read anew when replaced) or an environment variable, and its holder's limits."""

    name: str = Field(pattern=r"^[\w.-]+$", description="stands in logs and statistics in place of the token")
    file: Path | None = None
    env: str | None = None
    max_variants_per_second: float | None = Field(None, gt=0)
    max_queued_variants: int | None = Field(None, ge=1)
    highest_priority: Literal["interactive", "training", "bulk"] = Field(
        "training", description="the most urgent class that its requests wait in; a higher claim is lowered to it"
    )

    @field_validator("env")
    @classmethod
    def _one_place(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("file") is None):
            raise ValueError("a token is read from `file` or from `env`; give one of them")
        return value


class ServerFile(Section):
    """One server process: one device, one or more generators."""

    # Before the address, whose rule looks at them.
    tls: TLSConfig | None = None
    tokens: list[TokenConfig] = Field(default_factory=list, description="if any, every call but health needs one")
    address: str = Field("127.0.0.1:50051", description="host:port (port 0: any free one) or unix:/path")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="torch threads on CPU")
    buckets: Buckets = Field(
        BUCKETS, description="batch sizes that the device computes; smaller batches are padded up to the next one"
    )
    batching: Literal["dynamic", "deterministic"] = Field(
        "dynamic",
        description="deterministic: pad every batch to the largest bucket, so that variants agree bit for bit",
    )
    ageing_seconds: float = Field(
        10.0,
        gt=0,
        description="once rows of a priority class have waited so long, they rise by one class, a batch at a time",
    )
    memory_cache_bytes: int = Field(
        256 * 2**20, ge=0, description="memory for finished variants, all that holds them included"
    )
    store: StoreConfig | None = None
    embedding_cache: int = Field(100_000, ge=0, description="source embeddings kept in memory")
    known_fingerprints: list[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]] = Field(
        default_factory=list,
        description="of the clients' stored variants: a generator whose former fingerprint is among them goes by it",
    )
    drain_seconds: float = Field(
        10.0,
        ge=0,
        description="after SIGTERM, how long requests under way may take to finish; without any it stops",
    )
    limits: LimitsConfig = LimitsConfig()
    metrics: MetricsConfig | None = None
    log: Literal["human", "json"] = "human"
    generators: Annotated[list[SerializeAsAny[ComponentConfig]], Kind("generators")] = Field(min_length=1)

    @field_validator("tokens")
    @classmethod
    def _one_name_each(cls, value: list[TokenConfig]) -> list[TokenConfig]:
        names = [token.name for token in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"more than one token has the name {', '.join(twice)}")
        return value

    @field_validator("address")
    @classmethod
    def _address(cls, value: str, info: ValidationInfo) -> str:
        check_address(value)
        if not is_local(value) and not info.data.get("tls", True) and not info.data.get("tokens", True):
            raise ValueError(
                "without `tls` or `tokens` only addresses of this machine can be served (127.0.0.1, localhost, [::1] "
                "or unix:/path), since anyone who reaches the port could use the device; to serve others, add one of "
                "them, or forward the port through ssh"
            )
        return value

    @field_validator("generators")
    @classmethod
    def _one_id_each(cls, value: list[ComponentConfig]) -> list[ComponentConfig]:
        ids = [generator_id(config) for config in value]
        if twice := sorted({id for id in ids if ids.count(id) > 1}):
            raise ValueError(f"more than one generator has the id {', '.join(twice)}; give each its own `id:`")
        return value

    def warnings(self) -> list[str]:
        """Returns settings that are allowed but leave a door open, or that cost speed."""
        found = [
            f"generators.{position}.{warning}"
            for position, config in enumerate(self.generators)
            for warning in config.warnings()
        ]
        if not is_local(self.address):
            if self.tls is None:
                found.append(f"address {self.address}: tokens and images travel unencrypted; add `tls`")
            elif not self.tokens and self.tls.client_ca is None:
                found.append(f"address {self.address}: anyone who reaches it may use it; add `tokens` or tls.client_ca")
        return found


def generator_id(config: ComponentConfig) -> str:
    """Returns the name by which clients ask for this generator: its `id`, or its registry name."""
    return getattr(config, "id", None) or config.name
