"""What a server lets its clients ask for, and the memory that they can make it hold by asking."""

from __future__ import annotations

from pydantic import Field, model_validator

from genssl.config.base import Section

# A call whose message has not been asked for: a window of data, its metadata, and the objects of gRPC and asyncio.
CALL_BYTES = 64 * 2**10
# A pixel on its way from file to conditioner, at its widest: a decoder's own, Pillow's four bytes, copies of three.
DECODING_BYTES = 22
BESIDE_PIXELS = 2**20
# A finished message stands in gRPC's buffers, in their pieces and in one piece while it is handed over.
HANDED_OVER = 2
SMALL_MESSAGES = 2  # on their way in beside those with images; how large they are is not known before they are here
# What is held stands twice while it is handed on: a request is parsed, an answer is serialised and then sent.
COPIES = 2
# A server counts a stream for a while after its call has ended, and by then a client has opened the next one: with as
# many streams as calls some are refused (findings/grpc_refused_stream.sh).
STREAMS_A_CALL = 2
RECEIVING_SHARE = 4  # of the memory that calls may take, this part is for messages that are not finished yet

# What the server allows in one limit it must be able to take under another: (smaller, larger, bytes beside it).
MESSAGE_ROOM = 2**16
WITHIN = (
    ("max_image_bytes", "max_message_bytes", MESSAGE_ROOM),
    ("max_message_bytes", "max_queued_bytes_per_client", 0),
    ("max_queued_bytes_per_client", "max_queued_bytes", 0),
    ("max_variants_per_request", "max_queued_variants_per_client", 0),
    ("max_queued_variants_per_client", "max_queued_variants", 0),
)


class LimitsConfig(Section):
    """What one request may ask for, and what all of them may hold; checked before anything is decoded.

    `max_memory_bytes` bounds what clients can make the server hold beside its models and caches, whatever they do.
    A part of it is what calls, decoding and the handing over of messages take at most; the rest is shared by messages
    being received and by requests with their answers, which count until their last byte was sent or dropped.

    A limit that the file does not give follows a lower one that it lies within: with `max_message_bytes: 1048576` alone
    images may have 983,040 bytes. Limits that contradict each other are refused.
    """

    max_variants_per_request: int = Field(1024, ge=1)
    max_message_bytes: int = Field(32 * 2**20, ge=2**16)
    max_image_bytes: int = Field(16 * 2**20, ge=2**10)
    max_image_pixels: int = Field(16_000_000, ge=64)
    max_request_pixels: int = Field(
        1_000_000_000, ge=64, description="pixels of all images that a request brings, as their headers say"
    )
    max_size_factor: float = Field(
        4.0, ge=1, description="how many times a generator's own image_size or output_size a request may ask for"
    )
    max_connections: int = Field(
        128,
        ge=1,
        description="connections at once; further ones are closed at once (a worker of a DataLoader has its own)",
    )
    max_calls_per_connection: int = Field(32, ge=1, description="further ones wait at the client")
    receive_seconds: float = Field(20.0, gt=0, description="for a message to come in whole, once its turn has come")
    send_seconds: float = Field(30.0, gt=0, description="for a client to take its answer; then the call is dropped")
    max_queued_variants: int = Field(
        16384, ge=1, description="rows waiting in the server; more are refused with RESOURCE_EXHAUSTED"
    )
    max_queued_variants_per_client: int = Field(8192, ge=1)
    max_queued_bytes_per_client: int = Field(256 * 2**20, ge=2**16)
    max_memory_bytes: int = Field(
        2 * 2**30, ge=2**20, description="what clients can make the server hold beside its models and caches"
    )
    max_queued_bytes: int | None = Field(
        None,
        ge=2**16,
        description="bytes of requests and answers held at once; by default all that max_memory_bytes leaves",
    )

    @model_validator(mode="after")
    def _without_contradiction(self) -> LimitsConfig:
        followed: dict[str, str] = {}
        found = [problem] if (problem := self._beyond_memory(followed)) else []
        for name, within, beside in reversed(WITHIN):  # the widest first, so that what follows can be followed
            value, bound = getattr(self, name), getattr(self, within)
            if bound is None or value <= bound - beside:
                continue
            most, within = bound - beside, followed.get(within, within)
            least = next(rule.ge for rule in type(self).model_fields[name].metadata if hasattr(rule, "ge"))
            if name not in self.model_fields_set and most >= least:
                self.__dict__[name], followed[name] = most, within
                continue
            default = "" if within in self.model_fields_set else ", its default"
            room = f" less {beside:,} for the rest of a message" if beside else ""
            found.append(
                f"{name} is {value:,}, but {within} allows {bound:,}{default}{room}: raise {within} to "
                f"{value + beside} or more, or lower {name} to {most}"
                if most >= least
                else f"{within} is {bound:,}, too little for any {name}; raise it to {least + beside}"
            )
        if found:
            raise ValueError("; ".join(found))
        return self

    def _beyond_memory(self, followed: dict[str, str]) -> str | None:
        """Lowers what requests and answers may hold to what the memory leaves, or says why that cannot be."""
        name = "max_queued_bytes_per_client" if self.max_queued_bytes is None else "max_queued_bytes"
        value, left = getattr(self, name), self._left_bytes()
        if value <= left:
            return None
        if name not in self.model_fields_set and left >= self.max_message_bytes:
            self.__dict__[name], followed[name] = left, "max_memory_bytes"
            return None
        receiving = max(2 * self.max_message_bytes, -(-COPIES * value // (RECEIVING_SHARE - 1)))
        return (
            f"max_memory_bytes ({self.max_memory_bytes:,}) leaves {max(0, left):,} bytes for requests and answers "
            f"beside {self.fixed_bytes():,} for {self.max_connections} connections of {self.max_calls_per_connection} "
            f"calls, decoding and the handing over of messages, which is less than {name} ({value:,}); raise it to "
            f"{self.fixed_bytes() + COPIES * value + receiving:,} or lower the others"
        )

    def fixed_bytes(self) -> int:
        """Returns the part of `max_memory_bytes` for calls as such, decoding and messages being handed over."""
        calls = self.max_connections * self.streams_per_connection() * CALL_BYTES
        decoding = DECODING_BYTES * self.pixels_at_once() + 2 * self.max_image_bytes
        return calls + decoding + (HANDED_OVER + SMALL_MESSAGES) * self.max_message_bytes

    def pixels_at_once(self) -> int:
        """Returns how many pixels are decoded at once: an image of the largest size, and small ones beside it."""
        return self.max_image_pixels + BESIDE_PIXELS

    def messages_received_at_once(self) -> int:
        """Returns how many messages of the largest size may be on their way in at once."""
        rest = self.max_memory_bytes - self.fixed_bytes()
        return max(2, rest // RECEIVING_SHARE // self.max_message_bytes)

    def most_queued_bytes(self) -> int:
        """Returns how many bytes of requests and answers are held at once."""
        return self._left_bytes() if self.max_queued_bytes is None else self.max_queued_bytes

    def streams_per_connection(self) -> int:
        """Returns how many streams a connection may have open; see `STREAMS_A_CALL`."""
        return STREAMS_A_CALL * self.max_calls_per_connection

    def _left_bytes(self) -> int:
        rest = self.max_memory_bytes - self.fixed_bytes() - self.messages_received_at_once() * self.max_message_bytes
        return rest // COPIES
