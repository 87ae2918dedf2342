"""The rows of all requests, merged into batches for the device. Imports no gRPC."""
