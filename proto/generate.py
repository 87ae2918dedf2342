"""Makes the Python stubs in genssl/generation/v1 from the .proto file: `python proto/generate.py`.

Needs grpcio-tools==1.76.0, an old toolchain on purpose: stubs run on every protobuf and grpcio from the version that
made them up, never below.
`--check` only says whether the stubs are current.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TOOLS_VERSION = "1.76.0"
ROOT = Path(__file__).resolve().parent.parent
PROTO = "genssl/generation/v1/generation.proto"


def generate(out: Path) -> dict[str, str]:
    """Writes the stubs below `out` and returns their text by relative path."""
    import grpc_tools
    from grpc_tools import protoc

    include = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [
        "protoc",
        f"-I{ROOT / 'proto'}",
        f"-I{include}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        PROTO,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    return {path.relative_to(out).as_posix(): path.read_text() for path in sorted(out.rglob("*_pb2*"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if version("grpcio-tools") != TOOLS_VERSION:
        print(
            f"grpcio-tools {version('grpcio-tools')} is installed; the stubs are made with {TOOLS_VERSION}",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        stubs = generate(Path(folder))
    stale = [name for name, text in stubs.items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
    if check:
        print(
            f"stale: {', '.join(stale)}; run python proto/generate.py" if stale else f"{len(stubs)} stubs are current"
        )
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(stubs[name])
    print(f"{len(stale)} of {len(stubs)} stubs written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
