"""A client in JavaScript, made from the .proto alone, gets the variants that Python makes in process."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genssl.data.base import StoredImage
from genssl.data.decode import decode
from genssl.variants.engine import VariantEngine

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto" / "genssl" / "generation" / "v1" / "generation.proto"
CLIENT = Path(__file__).parents[1] / "helpers" / "node_client"


@pytest.fixture
def node_client(tmp_path) -> Path:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node.js here")
    folder = tmp_path / "node_client"
    shutil.copytree(CLIENT, folder)
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True, timeout=240
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install the client's packages here: {installed.stderr[-300:]}")
    return folder / "client.js"


@pytest.mark.slow
def test_a_javascript_client_gets_the_variants_of_its_image(node_client, server, unclip, digits_test, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(digits_test.image(5).transpose(1, 2, 0)).save(buffer, format="PNG")
    image_path = tmp_path / "digit.png"
    image_path.write_bytes(buffer.getvalue())
    command = ["node", str(node_client), str(PROTO), server.address, str(image_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)

    assert answer["first"] == ["ITEM_CODE_SOURCE_MISSING"] * 2, "digest first"
    assert [variant["status"] for variant in answer["variants"]] == ["ITEM_CODE_OK"] * 2
    got = np.stack(
        [
            np.frombuffer(base64.b64decode(variant["data"]), np.uint8).reshape(variant["shape"])
            for variant in answer["variants"]
        ]
    )
    stored = StoredImage(buffer.getvalue(), "file")
    engine = VariantEngine(unclip, [2])
    (embedding,), _ = engine.embed([unclip.preprocess(decode(stored))])
    rows = [engine.row(stored.source_id, embedding, index, engine.complete({})) for index in range(2)]
    expected, _ = engine.generate(rows)
    assert np.abs(got.astype(int) - expected).max() <= 1
