"""Protobuf stubs, version 1 of the contract."""
