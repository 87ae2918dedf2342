"""`genssl store` as a user meets it: exit codes, messages, and nothing left behind by a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genssl.data.base import StoredImage
from genssl.variants.key import VariantKey
from genssl.variants.store.manifest import StoredGenerator
from genssl.variants.store.store import VariantStore
from genssl.variants.store.verify import verify

GENERATOR = b"g" * 16


@pytest.fixture
def store(tmp_path) -> Path:
    """A store of three variants of each of four sources."""
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), np.uint8)
    with VariantStore(tmp_path / "variants") as store:
        store.describe_generator(GENERATOR, StoredGenerator(name="flow", model="[my model]", licence="MIT"))
        store.put_many(
            [(VariantKey(bytes([n // 3]) * 16, GENERATOR, b"p" * 16, n % 3), one) for n, one in enumerate(images)]
        )
    return tmp_path / "variants"


@pytest.fixture
def genssl(tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "genssl", "store", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr
        return done

    return call


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """Returns every path with its content, but for LMDB's list of readers."""
    paths = (path for path in folder.rglob("*") if path.name != "lock.mdb")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def damage(store: Path) -> None:
    (data,) = store.glob("writers/*/data.mdb")
    content = bytearray(data.read_bytes())
    with VariantStore(store, readonly=True) as opened:
        pixels = opened.get(VariantKey(bytes(16), GENERATOR, b"p" * 16, 0).digest()).tobytes()
    content[content.find(pixels)] ^= 1
    data.write_bytes(content)


def test_verify_says_clean_or_damaged_by_its_exit_code(genssl, store):
    done = genssl("verify", "variants")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "variants: 12 records and 12 links of 1 writer, all intact\n"
    damage(store)
    done = genssl("verify", "variants")
    assert (done.returncode, done.stderr) == (1, "")
    name = VariantKey(bytes(16), GENERATOR, b"p" * 16, 0).digest().hex()
    first, last = done.stdout.splitlines()
    assert first.endswith(f": record {name}: its checksum is wrong")
    assert last.startswith("variants: 1 damaged of 12 records and 12 links of 1 writer; ")


def test_records_that_are_gone_altogether_are_missed_by_every_command(genssl, store):
    (data,) = store.glob("writers/*/data.mdb")
    data.unlink()
    gone = "data.mdb is empty or gone: 12 records were committed here"
    done = genssl("verify", "variants")
    assert done.returncode == 1
    assert gone in done.stdout
    assert gone in genssl("stats", "variants").stdout
    done = genssl("merge", "all", "variants")
    assert done.returncode == 1
    assert gone in done.stdout
    done = genssl("export", "variants", "shards")
    assert (done.returncode, done.stdout) == (2, "")
    assert gone in done.stderr


def test_stats_tabulates_what_there_is(genssl, store):
    done = genssl("stats", "variants")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {
        cells[1].strip(): cells[2].strip() for line in done.stdout.splitlines() if len(cells := line.split("│")) > 2
    }
    assert rows["variants"] == "12"
    assert rows["sources"] == "4"
    assert rows["variants of a source: least, mean, most"] == "3  3.00  3"
    assert rows[f"generator flow ([my model]), fingerprint {GENERATOR.hex()}, MIT"] == "12 variants"
    assert rows["raw, 3 x 16 x 16"] == f"12 records, {12 * (84 + 768):,} bytes"


def test_merge_export_and_import_make_folders_and_say_so(genssl, store, tmp_path):
    assert genssl("merge", "all", "variants", "variants").stdout == "all: 12 variants\n"
    done = genssl("export", "all", "shards")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("shards: 12 variants in 1 shard, ")
    assert genssl("export", "all", "pictures", "--format", "folder").stdout.startswith("pictures: 12 variants, ")
    (tmp_path / "data").mkdir()
    for path in sorted((tmp_path / "pictures").glob("*_0.png")):
        Image.new("RGB", (9, 9)).save(tmp_path / "data" / path.name.replace("_0.png", ".jpg"))
    done = genssl("import", "pictures", "mine", "--dataset-root", "data", "--generator-name", "x", "--licence", "MIT")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine: 12 variants imported\n", "")
    assert genssl("verify", "mine").returncode == 0


def test_an_export_is_imported_without_a_word_of_what_it_is(genssl, store, tmp_path):
    """And what its images are of is told once it is known where to look."""
    photos = np.random.default_rng(1).integers(0, 256, (2, 12, 12, 3), np.uint8)
    for name, pixels in zip(("cats/a.png", "dogs/b.png"), photos, strict=True):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
        source = StoredImage((tmp_path / "photos" / name).read_bytes(), "file").source_id
        with VariantStore(store) as opened:
            opened.put_many([(VariantKey(source, GENERATOR, b"p" * 16, 0), pixels.transpose(2, 0, 1))])
    done = genssl("export", "variants", "shards")
    assert done.returncode == 0
    assert "variants does not name its data set: path and label are empty; give --dataset" in done.stdout
    assert "shards: the store knows the parameters by their digest alone" in done.stdout
    block = "{name: folder, root: photos, labels: subfolders, test_root: other}"
    (tmp_path / "other" / "cats").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "other" / "cats" / "z.png")
    done = genssl("export", "variants", "pictures", "--format", "folder", "--dataset", block)
    assert done.returncode == 0
    assert "pictures: 4 sources are not in the data set, so path and label" in done.stdout
    table = (tmp_path / "pictures" / "variants.csv").read_text()
    assert ',"cats/a.png",0,"cats",0,' in table
    assert ',"dogs/b.png",1,"dogs",0,' in table
    for out, folder in (("one", "shards"), ("two", "pictures")):
        done = genssl("import", folder, out)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}: 14 variants imported\n", "")
        assert verify(tmp_path / out).damage == []
    (image, *_) = (tmp_path / "pictures").glob("*.png")
    image.write_bytes(image.read_bytes()[:60])
    done = genssl("import", "pictures", "three")
    assert done.returncode == 1
    assert done.stdout.splitlines()[1:] == [
        "three: 13 variants imported",
        "pictures: left out: 1 image other than exported",
    ]
    image.unlink()
    done = genssl("import", "pictures", "four")
    assert (done.returncode, done.stdout) == (2, "")
    assert "1 of its 14 variants have no file, such as" in done.stderr
    done = genssl("import", "pictures", "four", "--skip-unknown")
    assert (done.returncode, done.stdout) == (1, "four: 13 variants imported, 1 without a file left out\n")


def test_damaged_records_are_left_out_and_the_exit_code_says_so(genssl, store):
    damage(store)
    done = genssl("merge", "all", "variants")
    assert done.returncode == 1
    assert done.stdout.splitlines()[1:] == ["all: 11 variants", "all: 1 damaged record was not copied"]
    done = genssl("export", "variants", "shards")
    assert done.returncode == 1
    assert "shards: 1 damaged variant was left out; genssl store verify variants names it" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nothing"], "nothing is not a variant store: it has no store.json"),
        (["stats", "."], ". is not a variant store: it has no store.json"),
        (["merge", "variants", "variants"], "{0}/variants exists and is not an empty folder; give a new folder"),
        (["export", "variants", "."], "{0} exists and is not an empty folder; give a new folder"),
        (["export", "variants", "out", "--generator", "ff"], "variants holds nothing of --generator ff; it holds 6767"),
        (
            ["import", "nothing", "out", "--dataset-root", ".", "--generator-name", "x"],
            "FOLDER nothing does not exist; give a folder of images (.jpg, ",
        ),
        (
            ["import", ".", "out", "--dataset-root", "nothing", "--generator-name", "x"],
            "--dataset-root nothing does not exist; give a folder of images (.jpg, ",
        ),
        (
            ["import", ".", "out", "--dataset-root", ".", "--generator-name", " "],
            "--generator-name is empty; name what",
        ),
        (
            ["import", ".", "out"],
            "--dataset-root is missing: . has no export.json, so it is not an export of a store; for ",
        ),
        (["import", ".", "out", "--dataset-root", "."], "--generator-name is missing; images of another program need "),
        (["export", "variants", "out", "--dataset", "digit"], "--dataset 'digit': dataset.name: 'digit' is not one of"),
        (
            ["export", "variants", "out", "--dataset", "{name: folder, root: nowhere}"],
            "dataset.root: {0}/nowhere does not exist; give the folder that holds the images",
        ),
        (["import", ".", "out", "--dataset-root", ".", "--generator-name", "x"], ".: no image belongs to one in .; "),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else None,
)
def test_mistakes_are_one_message_and_leave_nothing(genssl, store, tmp_path, arguments, message):
    before = snapshot(tmp_path)
    done = genssl(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"genssl: {message.format(tmp_path)}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_a_wrong_format_is_refused_with_the_choices(genssl, store):
    done = genssl("export", "variants", "out", "--format", "zip")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'webdataset'" in done.stderr
