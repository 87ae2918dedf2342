from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_ENCODING_UNSPECIFIED: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_RAW: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_FILE: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_PNG: _ClassVar[ImageEncoding]

class Origin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORIGIN_UNSPECIFIED: _ClassVar[Origin]
    ORIGIN_GENERATED: _ClassVar[Origin]
    ORIGIN_STORE: _ClassVar[Origin]
    ORIGIN_MEMORY: _ClassVar[Origin]

class Batching(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BATCHING_UNSPECIFIED: _ClassVar[Batching]
    BATCHING_DYNAMIC: _ClassVar[Batching]
    BATCHING_DETERMINISTIC: _ClassVar[Batching]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_TRAINING: _ClassVar[Priority]
    PRIORITY_BULK: _ClassVar[Priority]

class ItemCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ITEM_CODE_UNSPECIFIED: _ClassVar[ItemCode]
    ITEM_CODE_OK: _ClassVar[ItemCode]
    ITEM_CODE_SOURCE_MISSING: _ClassVar[ItemCode]
    ITEM_CODE_BAD_IMAGE: _ClassVar[ItemCode]
    ITEM_CODE_DIGEST_MISMATCH: _ClassVar[ItemCode]
    ITEM_CODE_BAD_SPEC: _ClassVar[ItemCode]
    ITEM_CODE_GENERATOR_FAILED: _ClassVar[ItemCode]
IMAGE_ENCODING_UNSPECIFIED: ImageEncoding
IMAGE_ENCODING_RAW: ImageEncoding
IMAGE_ENCODING_FILE: ImageEncoding
IMAGE_ENCODING_PNG: ImageEncoding
ORIGIN_UNSPECIFIED: Origin
ORIGIN_GENERATED: Origin
ORIGIN_STORE: Origin
ORIGIN_MEMORY: Origin
BATCHING_UNSPECIFIED: Batching
BATCHING_DYNAMIC: Batching
BATCHING_DETERMINISTIC: Batching
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_TRAINING: Priority
PRIORITY_BULK: Priority
ITEM_CODE_UNSPECIFIED: ItemCode
ITEM_CODE_OK: ItemCode
ITEM_CODE_SOURCE_MISSING: ItemCode
ITEM_CODE_BAD_IMAGE: ItemCode
ITEM_CODE_DIGEST_MISMATCH: ItemCode
ITEM_CODE_BAD_SPEC: ItemCode
ITEM_CODE_GENERATOR_FAILED: ItemCode

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "device", "max_variants_per_request", "max_message_bytes", "max_image_bytes", "max_image_pixels", "max_queued_variants", "max_queued_variants_per_client", "max_queued_bytes", "max_queued_bytes_per_client", "buckets", "batching", "instance_id", "threads", "max_concurrent_calls")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MAX_VARIANTS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_VARIANTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_VARIANTS_PER_CLIENT_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_BYTES_PER_CLIENT_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    BATCHING_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_CALLS_FIELD_NUMBER: _ClassVar[int]
    version: str
    device: str
    max_variants_per_request: int
    max_message_bytes: int
    max_image_bytes: int
    max_image_pixels: int
    max_queued_variants: int
    max_queued_variants_per_client: int
    max_queued_bytes: int
    max_queued_bytes_per_client: int
    buckets: _containers.RepeatedScalarFieldContainer[int]
    batching: Batching
    instance_id: str
    threads: int
    max_concurrent_calls: int
    def __init__(self, version: _Optional[str] = ..., device: _Optional[str] = ..., max_variants_per_request: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., max_queued_variants: _Optional[int] = ..., max_queued_variants_per_client: _Optional[int] = ..., max_queued_bytes: _Optional[int] = ..., max_queued_bytes_per_client: _Optional[int] = ..., buckets: _Optional[_Iterable[int]] = ..., batching: _Optional[_Union[Batching, str]] = ..., instance_id: _Optional[str] = ..., threads: _Optional[int] = ..., max_concurrent_calls: _Optional[int] = ...) -> None: ...

class ListGeneratorsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListGeneratorsResponse(_message.Message):
    __slots__ = ("generators",)
    GENERATORS_FIELD_NUMBER: _ClassVar[int]
    generators: _containers.RepeatedCompositeFieldContainer[GeneratorInfo]
    def __init__(self, generators: _Optional[_Iterable[_Union[GeneratorInfo, _Mapping]]] = ...) -> None: ...

class GeneratorInfo(_message.Message):
    __slots__ = ("generator_id", "name", "model", "fingerprint", "embedding_dim", "image_size", "licence", "default_parameters", "settings", "tflops")
    class DefaultParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    GENERATOR_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIM_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    TFLOPS_FIELD_NUMBER: _ClassVar[int]
    generator_id: str
    name: str
    model: str
    fingerprint: bytes
    embedding_dim: int
    image_size: int
    licence: str
    default_parameters: _containers.ScalarMap[str, float]
    settings: _containers.ScalarMap[str, str]
    tflops: float
    def __init__(self, generator_id: _Optional[str] = ..., name: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., embedding_dim: _Optional[int] = ..., image_size: _Optional[int] = ..., licence: _Optional[str] = ..., default_parameters: _Optional[_Mapping[str, float]] = ..., settings: _Optional[_Mapping[str, str]] = ..., tflops: _Optional[float] = ...) -> None: ...

class SourceImage(_message.Message):
    __slots__ = ("digest", "data", "encoding", "channels", "height", "width")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    data: bytes
    encoding: ImageEncoding
    channels: int
    height: int
    width: int
    def __init__(self, digest: _Optional[bytes] = ..., data: _Optional[bytes] = ..., encoding: _Optional[_Union[ImageEncoding, str]] = ..., channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class VariantSpec(_message.Message):
    __slots__ = ("source_index", "variant_index", "seed", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SOURCE_INDEX_FIELD_NUMBER: _ClassVar[int]
    VARIANT_INDEX_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    source_index: int
    variant_index: int
    seed: int
    parameters: _containers.ScalarMap[str, float]
    def __init__(self, source_index: _Optional[int] = ..., variant_index: _Optional[int] = ..., seed: _Optional[int] = ..., parameters: _Optional[_Mapping[str, float]] = ...) -> None: ...

class OutputSpec(_message.Message):
    __slots__ = ("encoding",)
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    encoding: ImageEncoding
    def __init__(self, encoding: _Optional[_Union[ImageEncoding, str]] = ...) -> None: ...

class GenerateVariantsRequest(_message.Message):
    __slots__ = ("generator_id", "expected_fingerprint", "parameters", "sources", "variants", "output", "priority", "client_id", "request_id")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    GENERATOR_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    generator_id: str
    expected_fingerprint: bytes
    parameters: _containers.ScalarMap[str, float]
    sources: _containers.RepeatedCompositeFieldContainer[SourceImage]
    variants: _containers.RepeatedCompositeFieldContainer[VariantSpec]
    output: OutputSpec
    priority: Priority
    client_id: str
    request_id: str
    def __init__(self, generator_id: _Optional[str] = ..., expected_fingerprint: _Optional[bytes] = ..., parameters: _Optional[_Mapping[str, float]] = ..., sources: _Optional[_Iterable[_Union[SourceImage, _Mapping]]] = ..., variants: _Optional[_Iterable[_Union[VariantSpec, _Mapping]]] = ..., output: _Optional[_Union[OutputSpec, _Mapping]] = ..., priority: _Optional[_Union[Priority, str]] = ..., client_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class Variant(_message.Message):
    __slots__ = ("spec_index", "data", "encoding", "channels", "height", "width", "origin", "status")
    SPEC_INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    spec_index: int
    data: bytes
    encoding: ImageEncoding
    channels: int
    height: int
    width: int
    origin: Origin
    status: ItemStatus
    def __init__(self, spec_index: _Optional[int] = ..., data: _Optional[bytes] = ..., encoding: _Optional[_Union[ImageEncoding, str]] = ..., channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., origin: _Optional[_Union[Origin, str]] = ..., status: _Optional[_Union[ItemStatus, _Mapping]] = ...) -> None: ...

class ItemStatus(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: ItemCode
    message: str
    def __init__(self, code: _Optional[_Union[ItemCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class GenerateVariantsResponse(_message.Message):
    __slots__ = ("variants", "missing_digests", "timings")
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    MISSING_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    variants: _containers.RepeatedCompositeFieldContainer[Variant]
    missing_digests: _containers.RepeatedScalarFieldContainer[bytes]
    timings: Timings
    def __init__(self, variants: _Optional[_Iterable[_Union[Variant, _Mapping]]] = ..., missing_digests: _Optional[_Iterable[bytes]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_seconds", "generate_seconds", "encode_seconds")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GENERATE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    generate_seconds: float
    encode_seconds: float
    def __init__(self, queue_seconds: _Optional[float] = ..., generate_seconds: _Optional[float] = ..., encode_seconds: _Optional[float] = ...) -> None: ...

class GetStatisticsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatisticsResponse(_message.Message):
    __slots__ = ("version", "device", "state", "uptime_seconds", "generators", "clients", "rejections", "requests", "queued_bytes", "event_loop_lag_seconds")
    class RejectionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GENERATORS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVENT_LOOP_LAG_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: str
    device: str
    state: str
    uptime_seconds: float
    generators: _containers.RepeatedCompositeFieldContainer[GeneratorStatistics]
    clients: _containers.RepeatedCompositeFieldContainer[ClientStatistics]
    rejections: _containers.ScalarMap[str, int]
    requests: int
    queued_bytes: int
    event_loop_lag_seconds: float
    def __init__(self, version: _Optional[str] = ..., device: _Optional[str] = ..., state: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., generators: _Optional[_Iterable[_Union[GeneratorStatistics, _Mapping]]] = ..., clients: _Optional[_Iterable[_Union[ClientStatistics, _Mapping]]] = ..., rejections: _Optional[_Mapping[str, int]] = ..., requests: _Optional[int] = ..., queued_bytes: _Optional[int] = ..., event_loop_lag_seconds: _Optional[float] = ...) -> None: ...

class GeneratorStatistics(_message.Message):
    __slots__ = ("generator_id", "queued", "running", "variants_generated", "variants_from_store", "variants_from_memory", "variants_shared", "variants_failed", "variants_dropped", "sources_embedded", "embed_seconds", "encode_seconds", "queue_wait_seconds", "batches", "largest_bucket", "variants_redrawn")
    class QueuedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    GENERATOR_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_GENERATED_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FROM_STORE_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FROM_MEMORY_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_SHARED_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    SOURCES_EMBEDDED_FIELD_NUMBER: _ClassVar[int]
    EMBED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    LARGEST_BUCKET_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_REDRAWN_FIELD_NUMBER: _ClassVar[int]
    generator_id: str
    queued: _containers.ScalarMap[str, int]
    running: int
    variants_generated: int
    variants_from_store: int
    variants_from_memory: int
    variants_shared: int
    variants_failed: int
    variants_dropped: int
    sources_embedded: int
    embed_seconds: float
    encode_seconds: float
    queue_wait_seconds: float
    batches: _containers.RepeatedCompositeFieldContainer[BatchStatistics]
    largest_bucket: int
    variants_redrawn: int
    def __init__(self, generator_id: _Optional[str] = ..., queued: _Optional[_Mapping[str, int]] = ..., running: _Optional[int] = ..., variants_generated: _Optional[int] = ..., variants_from_store: _Optional[int] = ..., variants_from_memory: _Optional[int] = ..., variants_shared: _Optional[int] = ..., variants_failed: _Optional[int] = ..., variants_dropped: _Optional[int] = ..., sources_embedded: _Optional[int] = ..., embed_seconds: _Optional[float] = ..., encode_seconds: _Optional[float] = ..., queue_wait_seconds: _Optional[float] = ..., batches: _Optional[_Iterable[_Union[BatchStatistics, _Mapping]]] = ..., largest_bucket: _Optional[int] = ..., variants_redrawn: _Optional[int] = ...) -> None: ...

class BatchStatistics(_message.Message):
    __slots__ = ("bucket", "batches", "rows", "generate_seconds")
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    GENERATE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    bucket: int
    batches: int
    rows: int
    generate_seconds: float
    def __init__(self, bucket: _Optional[int] = ..., batches: _Optional[int] = ..., rows: _Optional[int] = ..., generate_seconds: _Optional[float] = ...) -> None: ...

class ClientStatistics(_message.Message):
    __slots__ = ("client_id", "queued_variants", "variants", "seconds_since_last_request")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUED_VARIANTS_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_LAST_REQUEST_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    queued_variants: int
    variants: int
    seconds_since_last_request: float
    def __init__(self, client_id: _Optional[str] = ..., queued_variants: _Optional[int] = ..., variants: _Optional[int] = ..., seconds_since_last_request: _Optional[float] = ...) -> None: ...
