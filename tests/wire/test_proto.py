"""The checked-in stubs are those of the .proto file."""

from __future__ import annotations

from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc

ROOT = Path(__file__).resolve().parents[2]
PROTO = "genssl/generation/v1/generation.proto"


def without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    """Drops names that only some versions of protoc write."""
    for message in file.message_type:
        for part in (message, *message.nested_type):
            for field in part.field:
                field.ClearField("json_name")
    return file


def test_stubs_are_current(tmp_path):
    """Compares descriptors, which do not depend on the protoc that made them; CI compares the text as well."""
    out = tmp_path / "descriptors"
    include = Path(grpc_tools.__file__).parent / "_proto"
    assert protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", f"--descriptor_set_out={out}", PROTO]) == 0
    compiled = FileDescriptorSet.FromString(out.read_bytes()).file[0]
    checked_in = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(checked_in)
    assert without_json_names(checked_in) == without_json_names(compiled)


def test_grpc_stubs_have_every_method_of_the_service():
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["GenerationService"].methods}
    assert methods == {"GetServerInfo", "ListGenerators", "GenerateVariants", "GetStatistics"}
    assert methods <= set(vars(pb_grpc.GenerationServiceServicer))


def test_enums_start_with_unspecified():
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")
