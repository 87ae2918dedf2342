"""Protobuf stubs of the wire contract, made by proto/generate.py; never edited by hand."""
