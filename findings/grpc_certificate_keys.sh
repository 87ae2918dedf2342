#!/usr/bin/env bash
# grpcio 1.85.3: a server takes certificates for Ed25519 and P-521 keys, opens its port and serves; no client of gRPC can
# connect, and what the client is told ("Socket closed") names neither TLS nor the key. Clients of OpenSSL do connect.
#
# Expected: a key that the library cannot use is refused when the port is opened, as those on secp256k1 are.
#
# Output seen:
#   grpcio 1.85.3
#   RSA 2048: port open, gRPC client UNIMPLEMENTED (it connects), OpenSSL client connects
#   P-256: port open, gRPC client UNIMPLEMENTED (it connects), OpenSSL client connects
#   P-521: port open, gRPC client UNAVAILABLE (Handshake read failed (Socket closed)), OpenSSL client connects
#   Ed25519: port open, gRPC client UNAVAILABLE (Handshake read failed (Socket closed)), OpenSSL client connects
#   secp256k1: port refused
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet grpcio==1.85.3 cryptography==50.0.2
"$folder/venv/bin/python" - <<'PYTHON' 2> /dev/null
import datetime
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

KEYS = {
    "RSA 2048": rsa.generate_private_key(65537, 2048),
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate(),
    "secp256k1": ec.generate_private_key(ec.SECP256K1()),
}


def certificate(key, kind):
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    return builder.sign(key, None if kind == "Ed25519" else hashes.SHA256()).public_bytes(Encoding.PEM)


print("grpcio", grpc.__version__)
seen = {}
for kind, key in KEYS.items():
    chain, private = certificate(key, kind), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    server = grpc.server(ThreadPoolExecutor(1))
    try:
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(private, chain)]))
    except RuntimeError:
        seen[kind] = "port refused"
        print(f"{kind}: port refused")
        continue
    server.start()
    with grpc.secure_channel(
        f"127.0.0.1:{port}", grpc.ssl_channel_credentials(chain), [("grpc.ssl_target_name_override", "localhost")]
    ) as channel:
        try:
            channel.unary_unary("/a/b")(b"", timeout=10)
        except grpc.RpcError as error:
            seen[kind] = error.code().name
            why = "it connects" if seen[kind] == "UNIMPLEMENTED" else error.details().rpartition(f"{port}: ")[2]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain):
        print(f"{kind}: port open, gRPC client {seen[kind]} ({why}), OpenSSL client connects", flush=True)
    server.stop(None)
expected = {"RSA 2048": "UNIMPLEMENTED", "P-256": "UNIMPLEMENTED", "P-521": "UNAVAILABLE", "Ed25519": "UNAVAILABLE"}
raise SystemExit(0 if seen == expected | {"secp256k1": "port refused"} else 1)
PYTHON
