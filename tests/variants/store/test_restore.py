"""What an export says of its images, and the store that is made of it again: the same keys, the same pixels."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genssl.config.load import parse_blocks
from genssl.data.base import raw_image
from genssl.data.load import load_dataset
from genssl.data.sources import Sources
from genssl.errors import DataError
from genssl.variants.key import VariantKey, parameters_digest
from genssl.variants.store.export import export
from genssl.variants.store.facts import GeneratorFacts, dataset_blocks, describe_contents
from genssl.variants.store.import_folder import import_export
from genssl.variants.store.manifest import StoreError, read_manifest
from genssl.variants.store.record import decode_image, read_head
from genssl.variants.store.scan import open_writers, records
from genssl.variants.store.store import VariantStore
from genssl.variants.store.verify import verify

FORMATS = pytest.mark.parametrize("format_", ["webdataset", "folder"])
FACTS = GeneratorFacts("flow", "[my model]", "MIT", b"g" * 16, {"guidance_scale": 1.5, "steps": 2}, 0.5)
VARIANTS = 3
SHARD_BYTES = 8192  # four shards


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four photos of two classes, with names over which spreadsheets and shells stumble, one of them no UTF-8."""
    for number, name in enumerate(("cats/a.png", 'cats/b, "c"\n.png', "dogs/ä.png", os.fsdecode(b"dogs/\xff.png"))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number).transpose(1, 2, 0)).save(path)
    return tmp_path / "photos"


def picture(number: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (channels, 12, 12), np.uint8)


def dataset_of(photos: Path):
    block = json.dumps({"name": "folder", "root": str(photos), "test_fraction": 0.3})
    (config,) = parse_blocks("dataset", [block])
    return json.loads(block), [
        ("train", lambda: load_dataset(config, "train")),
        ("test", lambda: load_dataset(config, "test")),
    ]


def make(folder: Path, photos: Path, *, channels: int = 3, encoding: str = "raw", pin: bool = False) -> Path:
    """Makes a store of three variants of each photo, of the train and of the test split."""
    block, splits = dataset_of(photos)
    with VariantStore(folder, encoding=encoding, fingerprint=FACTS.fingerprint, pin=pin) as store:
        described = {"name": "folder", "images": 4, "variants": VARIANTS}
        describe_contents(store, FACTS, {"name": "flow"}, "d" * 32, described, block)
        for _, load in splits:
            dataset = load()
            ids = [dataset.source_id(row) for row in range(len(dataset)) for _ in range(VARIANTS)]
            keys = FACTS.keys(ids, [index % VARIANTS for index in range(len(ids))])
            store.put_many([(key, picture(key.seed() % 2**32, channels)) for key in keys], strict=True)
    return folder


def content(folder: Path) -> dict[bytes, tuple[VariantKey, tuple[int, ...], bytes]]:
    with open_writers(folder) as writers:
        found = [record for writer in writers for _, record in records(writer.environment)]
    images = {read_head(record).key: decode_image(record) for record in found}
    return {key.digest(): (key, image.shape, image.tobytes()) for key, image in images.items()}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "variants.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def told_in(folder: Path) -> dict[str, dict]:
    """Returns what the .json beside every image says, by the name of the image."""
    told = {path.with_suffix(".png").name: json.loads(path.read_text()) for path in folder.glob("*_*.json")}
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    told[member.name.replace(".json", ".png")] = json.load(tar.extractfile(member))
    return told


def exported(folder: Path, out: Path, format_: str, **options) -> Path:
    assert export(folder, out, format_, shard_bytes=SHARD_BYTES, **options).variants == 4 * VARIANTS
    return out


@FORMATS
def test_table_and_json_say_path_label_index_and_parameters_of_each_image(tmp_path, photos, format_):
    folder = make(tmp_path / "store", photos)
    sources = Sources(dataset_of(photos)[1])
    out = tmp_path / "out"
    done = export(folder, out, format_, sources=sources, shard_bytes=SHARD_BYTES)
    assert (done.variants, done.unknown, done.parameters) == (12, 0, True)
    rows, told = rows_of(out), told_in(out)
    assert len(rows) == len(told) == 12
    by_source = {}
    for path in photos.rglob("*.png"):
        (row, *others) = [row for row in rows if row["path"] == path.relative_to(photos).as_posix()]
        assert len(others) == VARIANTS - 1
        by_source[row["source_id"]] = path.relative_to(photos).as_posix()
    assert len(by_source) == 4
    for row in rows:
        path = by_source[row["source_id"]]
        key = VariantKey(
            bytes.fromhex(row["source_id"]), b"g" * 16, parameters_digest(FACTS.parameters), int(row["index"])
        )
        expected = {
            "key": key.digest().hex(),
            "seed": str(key.seed()),
            "fingerprint": FACTS.fingerprint.hex(),
            "dataset": "folder",
            "path": path,
            "label": "0" if path.startswith("cats") else "1",
            "label_name": path.partition("/")[0],
            "parameter.guidance_scale": "1.5",
            "parameter.steps": "2",
            "pixels": raw_image(picture(key.seed() % 2**32)).source_id.hex(),
        }
        assert {name: row[name] for name in expected} == expected
        assert row["shard"].startswith("variants-0000") == (format_ == "webdataset")
        beside = told[row["file"]]
        assert beside.pop("parameter_values") == FACTS.parameters
        assert {name: str(value) for name, value in beside.items()} == {name: row[name] for name in beside}
    assert {row["split"] for row in rows} == {"train", "test"}


def test_what_is_not_known_is_empty_and_counted(tmp_path, photos, digits_train):
    folder = make(tmp_path / "store", photos)
    assert export(folder, tmp_path / "none", "folder").unknown is None
    done = export(folder, tmp_path / "other", "folder", sources=Sources([("train", lambda: digits_train)]))
    assert (done.variants, done.unknown) == (12, 4)
    for out in ("none", "other"):
        (row, *_), told = rows_of(tmp_path / out), told_in(tmp_path / out)
        assert [row[name] for name in ("dataset", "split", "row", "path", "label", "label_name")] == [""] * 6
        assert told[row["file"]]["label"] is None
    with VariantStore(tmp_path / "bare", fingerprint=b"g" * 16) as store:
        store.put_many([(VariantKey(b"s" * 16, b"g" * 16, b"p" * 16, 0), picture(0))])
    assert not export(tmp_path / "bare", tmp_path / "digest", "folder").parameters
    assert json.loads((tmp_path / "digest" / "export.json").read_text())["parameter_values"] is None


@FORMATS
@pytest.mark.parametrize(("channels", "encoding", "pin"), [(3, "raw", True), (1, "png", False)])
def test_the_store_that_an_export_makes_equals_the_exported_one(tmp_path, photos, format_, channels, encoding, pin):
    folder = make(tmp_path / "store", photos, channels=channels, encoding=encoding, pin=pin)
    out = exported(folder, tmp_path / "out", format_)
    done = import_export(out, tmp_path / "again")
    assert (done.variants, done.present, done.absent, done.unknown, done.corrupt) == (12, 0, 0, 0, [])
    assert content(tmp_path / "again") == content(folder)
    assert verify(tmp_path / "again").damage == []
    manifests = [json.loads((tmp_path / name / "store.json").read_text()) for name in ("store", "again")]
    for manifest in manifests:
        del manifest["created"]
    del manifests[0]["dataset_blocks"]  # what can be opened is not taken over from others
    assert manifests[0] == manifests[1]
    exported(tmp_path / "again", tmp_path / "out again", format_)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "out again")]
    assert files[0] == files[1]
    assert import_export(out, tmp_path / "again").present == 12


@FORMATS
def test_paths_with_line_ends_and_quotes_come_back(tmp_path, photos, format_):
    (photos / "cats").rename(photos / 'c\ra\nt"s, all')
    folder = make(tmp_path / "store", photos)
    out = tmp_path / "out"
    export(folder, out, format_, sources=Sources(dataset_of(photos)[1]), shard_bytes=SHARD_BYTES)
    assert 'c\ra\nt"s, all' in {row["label_name"] for row in rows_of(out)}
    assert import_export(out, tmp_path / "again").variants == 12


def test_an_export_says_nothing_of_where_things_are_and_its_import_opens_nothing(tmp_path, photos):
    folder = make(tmp_path / "store", photos)
    block = {"name": "flow", "model": str(tmp_path / "secret" / "flow"), "adapters": [str(tmp_path / "secret" / "a")]}
    with VariantStore(folder, fingerprint=b"g" * 16) as store:
        describe_contents(store, FACTS, block, "d" * 32, {"name": "x", "images": 4}, {"name": "folder", "root": "/x"})
    out = exported(folder, tmp_path / "out", "folder")
    told = json.loads((out / "export.json").read_text())["manifest"]
    assert {"name": "flow", "model": "flow", "adapters": ["a"]} in [one["block"] for one in told["generator_blocks"]]
    assert str(tmp_path) not in (out / "export.json").read_text()
    description = json.loads((out / "export.json").read_text())
    description["manifest"]["dataset_blocks"] = [{"name": "folder", "root": "/"}]
    (out / "export.json").write_text(json.dumps(description))
    import_export(out, tmp_path / "again")
    assert dataset_blocks(read_manifest(tmp_path / "again")) == []


@FORMATS
def test_an_export_is_added_to_a_store_of_the_same_and_not_to_one_of_another_generator(tmp_path, photos, format_):
    out = exported(make(tmp_path / "store", photos), tmp_path / "out", format_)
    with VariantStore(tmp_path / "mine", fingerprint=FACTS.fingerprint, pin=True) as store:
        other = VariantKey(b"s" * 16, FACTS.fingerprint, b"p" * 16, 0)
        store.put_many([(other, picture(0))])
    assert import_export(out, tmp_path / "mine").variants == 12
    assert content(tmp_path / "mine") == content(tmp_path / "store") | {
        other.digest(): (other, (3, 12, 12), picture(0).tobytes())
    }
    with VariantStore(tmp_path / "strange", fingerprint=b"x" * 16, pin=True):
        pass
    with pytest.raises(StoreError, match="variants of different generators must not be mixed"):
        import_export(out, tmp_path / "strange")


def rewrite(out: Path, change) -> None:
    """Lets `change` edit the images of an export, by name, wherever they lie; new shards hold what it leaves."""
    shards = sorted(out.glob("*.tar"))
    if not shards:
        files = {path.name: path.read_bytes() for path in out.glob("*.png")}
        change(files)
        for path in out.glob("*.png"):
            path.unlink()
        for name, data in files.items():
            (out / name).write_bytes(data)
        return
    for number, shard in enumerate(shards):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        if number == 0:
            change(files)
        with tarfile.open(shard, "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def names_in(files) -> list[str]:
    return sorted(name for name in files if name.endswith(".png"))


@FORMATS
def test_files_that_were_renamed_or_removed_are_named_and_nothing_is_written(tmp_path, photos, format_):
    folder = make(tmp_path / "store", photos)
    out = exported(folder, tmp_path / "out", format_)
    before: list[str] = []

    def change(files):
        before.extend(names_in(files)[:2])
        files["mine.png"] = files.pop(before[0])
        del files[before[1]]

    rewrite(out, change)
    shard = f"{rows_of(out)[0]['shard']}/" if format_ == "webdataset" else ""
    with pytest.raises(DataError) as caught:
        import_export(out, tmp_path / "again")
    said = str(caught.value)
    assert f"2 of its 12 variants have no file, such as {shard}{before[0]}, {shard}{before[1]}" in said
    assert f"1 of its images are in no row of the table, such as {shard}mine.png" in said
    assert not (tmp_path / "again").exists()
    done = import_export(out, tmp_path / "again", skip_unknown=True)
    assert (done.variants, done.absent, done.unknown) == (10, 2, 1)
    assert content(tmp_path / "again").items() < content(folder).items()


@FORMATS
def test_files_that_are_not_what_was_exported_are_named_and_left_out(tmp_path, photos, format_):
    """Exchanged, damaged, cut short, encoded with loss, of another size; a PNG that is packed otherwise is fine."""
    folder = make(tmp_path / "store", photos)
    out = exported(folder, tmp_path / "out", format_) if format_ == "folder" else tmp_path / "out"
    if format_ == "webdataset":
        export(folder, out, format_)  # one shard
    left_out: list[str] = []

    def change(files):
        names = names_in(files)
        one, other, damaged, short, lossy, large, packed = names[:7]
        files[one], files[other] = files[other], files[one]
        middle = len(files[damaged]) // 2
        files[damaged] = files[damaged][:middle] + bytes([files[damaged][middle] ^ 255]) + files[damaged][middle + 1 :]
        files[short] = files[short][:100]
        files[lossy] = saved(files[lossy], "JPEG")
        files[large] = saved(files[large], "PNG", size=(13, 12))
        files[packed] = saved(files[packed], "PNG", compress_level=9)
        left_out.extend((one, other, damaged, short, lossy, large))

    rewrite(out, change)
    done = import_export(out, tmp_path / "again")
    assert (done.variants, len(done.corrupt)) == (6, 6)
    assert sorted(Path(line.partition(": ")[0]).name for line in done.corrupt) == sorted(left_out)
    assert sum("are not those that were exported" in line for line in done.corrupt) == 2
    assert content(tmp_path / "again").items() < content(folder).items()
    assert verify(tmp_path / "again").damage == []
    shutil.rmtree(out)
    exported(folder, out, format_)
    done = import_export(out, tmp_path / "again")
    assert (done.variants, done.present) == (6, 6)
    assert content(tmp_path / "again") == content(folder)


def saved(png: bytes, format_: str, size: tuple[int, int] | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as opened:
        (opened.resize(size) if size else opened).save(buffer, format_, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_variants_of_a_shard_that_is_gone_or_cut_short_are_counted(tmp_path, photos, damage):
    folder = make(tmp_path / "store", photos)
    out = exported(folder, tmp_path / "out", "webdataset")
    (first, second, *_) = sorted(out.glob("*.tar"))
    lost = sum(row["shard"] == second.name for row in rows_of(out))
    if damage == "gone":
        second.unlink()
    else:
        second.write_bytes(second.read_bytes()[:300])
    with pytest.raises(DataError, match=rf"{lost} of its 12 variants have no file, such as {second.name}/"):
        import_export(out, tmp_path / "again")
    assert import_export(out, tmp_path / "again", skip_unknown=True).absent == lost
    assert first.exists()


@FORMATS
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("gone", "variants.csv cannot be read"),
        ("cut", "variants.csv has 11 rows, export.json says 12; restore it"),
        ("index", r"variants.csv:2: this row is not as it was exported"),
        ("spreadsheet", r"variants.csv:2: this row is not as it was exported"),
        ("description", "export.json cannot be read"),
        ("older", "does not say all that a store needs; export the store again"),
        ("newer", "this genssl .* reads 2: upgrade genssl"),
    ],
)
def test_a_table_or_description_that_was_changed_is_refused(tmp_path, photos, format_, damage, message):
    out = exported(make(tmp_path / "store", photos), tmp_path / "out", format_)
    table, description = out / "variants.csv", out / "export.json"
    lines = table.read_text().splitlines(keepends=True)
    if damage == "gone":
        table.unlink()
    elif damage == "cut":
        table.write_text("".join(lines[:-1]))
    elif damage in ("index", "spreadsheet"):
        cells = next(csv.reader([lines[1]]))
        place = next(csv.reader([lines[0]])).index("index")
        cells[place] = "7" if damage == "index" else f"{cells[place]}.0"
        table.write_text(lines[0] + ",".join(cells) + "\n" + "".join(lines[2:]))
    elif damage == "description":
        description.write_text(description.read_text()[:40])
    else:
        told = json.loads(description.read_text())
        told["format"] = f"genssl-export-{format_}/{1 if damage == 'older' else 3}"
        description.write_text(json.dumps(told))
    with pytest.raises(DataError, match=message):
        import_export(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_names_in_the_table_lead_nowhere_else(tmp_path, photos):
    out = exported(make(tmp_path / "store", photos), tmp_path / "out", "folder")
    (row, *_) = rows_of(out)
    (tmp_path / "secret.png").write_bytes((out / row["file"]).read_bytes())
    table = out / "variants.csv"
    table.write_text(table.read_text().replace(row["file"], "../secret.png"))
    with pytest.raises(DataError, match=r"1 of its 12 variants have no file, such as \.\./secret\.png"):
        import_export(out, tmp_path / "again")
