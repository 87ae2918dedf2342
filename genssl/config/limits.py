"""What a server lets its clients ask for, and the memory that they can make it hold by asking."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

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
RECEIVING_SHARE = 4  # of the memory that calls may take, this part is for messages that are not finished yet


class LimitsConfig(Section):
    """What one request may ask for, and what all of them may hold; checked before anything is decoded.

    `max_memory_bytes` bounds what clients can make the server hold beside its models and caches, whatever they do.
    A part of it is what calls, decoding and the handing over of messages take at most; the rest is shared by messages
    being received and by requests with their answers, which count until their last byte was sent or dropped.
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
    max_connections: int = Field(128, ge=1, description="connections at once; further ones are closed at once")
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
        validate_default=True,
        description="bytes of requests and answers held at once; by default all that max_memory_bytes leaves",
    )

    @field_validator("max_queued_bytes")
    @classmethod
    def _fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Sees that the limits do not contradict each other, once all of them are known."""
        if not all(name in info.data for name in cls.model_fields if name != "max_queued_bytes"):
            return value  # another one is wrong, and is reported
        limits = cls.model_construct(**info.data)
        message, client, memory = limits.max_message_bytes, limits.max_queued_bytes_per_client, limits.max_memory_bytes
        name, least = "max_queued_bytes_per_client", client
        if value is not None and value < client:
            name, least = "max_queued_bytes", value
        if message > least:
            raise ValueError(
                f"max_message_bytes ({message:,}) is more than {name} ({least:,}), so that such a message would always "
                "be refused; lower the first or raise the second"
            )
        wanted = max(client, value or 0)
        if (most := limits.most_queued_bytes()) < wanted:
            receiving = max(2 * message, -(-COPIES * wanted // (RECEIVING_SHARE - 1)))
            raise ValueError(
                f"max_memory_bytes ({memory:,}) leaves {max(0, most):,} bytes for requests and answers beside "
                f"{limits.fixed_bytes():,} for {limits.max_connections} connections of "
                f"{limits.max_calls_per_connection} calls, decoding and the handing over of messages, which is less "
                f"than {'max_queued_bytes' if wanted == value else 'max_queued_bytes_per_client'} ({wanted:,}); raise "
                f"it to {limits.fixed_bytes() + COPIES * wanted + receiving:,} or lower the others"
            )
        return value

    def fixed_bytes(self) -> int:
        """Returns the part of `max_memory_bytes` for calls as such, decoding and messages being handed over."""
        calls = self.max_connections * self.max_calls_per_connection * CALL_BYTES
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
        rest = self.max_memory_bytes - self.fixed_bytes() - self.messages_received_at_once() * self.max_message_bytes
        return rest // COPIES if self.max_queued_bytes is None else self.max_queued_bytes
