"""Filling a store ahead of training: however it is cut, killed or interrupted, the same bytes lie there in the end."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.generators.fingerprint import fingerprint_folder
from genssl.generators.models import BUILTIN
from genssl.offline.pregenerate import Pregenerated, Shard, parse_shard, pregenerate
from genssl.training.progress import RunProgress
from genssl.training.run import run
from genssl.training.supply.open import open_stored
from genssl.variants.source import VariantRequest
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.scan import distinct_links, link_key, open_writers
from genssl.variants.store.store import VariantStore
from genssl.variants.store.verify import verify

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "simclr_sd.yaml"
QUICK = ["train.epochs=1", "schedule.warmup_epochs=0", "backbone.width=4", "train.threads=1", "evaluate=[]"]
EXACT = ["variants.source=in_process", "variants.batching=deterministic", "variants.buckets=[16]"]
PART = Shard(3, 24)  # 59 or 60 of the 1437 digits
VARIANTS = 3


def recipe_of(*overrides: str) -> Recipe:
    return load(Recipe, RECIPE, [*QUICK, *EXACT, *overrides])


class Told:
    """Keeps what it is told; `stop_after` batches it is interrupted."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.first: Pregenerated | None = None
        self.batches, self.stop_after = 0, stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, done: Pregenerated) -> None:
        self.first = Pregenerated(**vars(done))

    def advance(self, done: Pregenerated) -> None:
        self.batches += 1
        if self.batches == self.stop_after:
            raise KeyboardInterrupt


def fill(folder: Path, *overrides: str, **settings) -> Pregenerated:
    given = {"variants": VARIANTS, "report": Told(), "shard": PART, "rows": 16} | settings
    return pregenerate(recipe_of(*overrides), folder, **given)


def contents(folder: Path) -> dict[bytes, tuple[bytes, tuple[int, ...]]]:
    """Returns the image behind every digest."""
    with VariantStore(folder, readonly=True) as store:
        digests = sorted(set(store.digests()))
        images = store.get_many(digests)
        assert store.damaged == 0
        return {digest: (image.tobytes(), image.shape) for digest, image in zip(digests, images, strict=True)}


def assert_clean(folder: Path) -> None:
    found = verify(folder)
    assert found.records > 0
    assert found.damage == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store that was filled without interruption, and what the filling said."""
    folder = tmp_path_factory.mktemp("stores") / "whole"
    return folder, fill(folder)


def test_every_variant_of_the_shard_is_there_with_its_name(whole, digits_train):
    folder, done = whole
    rows = PART.rows(len(digits_train))
    distinct = {digits_train.source_id(row) for row in rows}
    assert (done.total, done.made, done.there) == (len(distinct) * VARIANTS, len(distinct) * VARIANTS, 0)
    assert done.generator_seconds > 0
    with VariantStore(folder, readonly=True) as store:
        assert len(store) == done.total
    with open_writers(folder) as writers:
        listed = [(source_id, link_key(source_id, link).index) for source_id, link in distinct_links(writers)]
    assert listed == [(source_id, index) for source_id in sorted(distinct) for index in range(VARIANTS)]


def test_the_manifest_names_generator_and_data_set(whole):
    folder, _ = whole
    manifest = json.loads((folder / "store.json").read_text())
    ((fingerprint, generator),) = manifest["generators"].items()
    assert 0 < generator.pop("tflops") < 0.001
    assert generator == {"name": "stable_unclip", "model": "builtin:digits-unclip", "licence": "Apache-2.0"}
    ((digest, dataset),) = manifest["datasets"].items()
    assert re.fullmatch(r"[0-9a-f]{32}", digest)
    assert dataset == {"name": "digits", "images": 1437, "variants": VARIANTS}
    (block,) = manifest["generator_blocks"]
    assert block["fingerprint"] == fingerprint
    assert block["parameters"]["noise_level"] == 300
    assert manifest["dataset_blocks"] == [{"name": "digits"}]


@pytest.mark.parametrize("format_", ["folder", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_a_store_made_of_its_export_serves_a_run_the_same_batches(whole, tmp_path, digits_train, format_):
    """And the export names the digit and its number for each image, by the data set that the manifest names."""
    folder, done = whole
    command = [sys.executable, "-m", "genssl", "store"]
    for arguments in (["export", str(folder), "out", "--format", format_], ["import", "out", "again"]):
        assert subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True).returncode == 0
    with (tmp_path / "out" / "variants.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == done.total
    for row in rows:
        number = int(row["row"])
        assert (row["dataset"], row["split"], row["path"]) == ("digits", "train", "")
        assert digits_train.source_id(number).hex() == row["source_id"]
        assert row["label"] == row["label_name"] == str(digits_train.label(number))
        assert float(row["parameter.noise_level"]) == 300
    assert contents(tmp_path / "again") == contents(folder)
    assert verify(tmp_path / "again").damage == []
    requests = [
        VariantRequest(row, digits_train.source_id(row), index)
        for row in PART.rows(len(digits_train))
        for index in range(VARIANTS)
    ]
    taken = []
    for store in (folder, tmp_path / "again"):
        stored = recipe_of("variants.source=stored", f"variants.store={store}", f"variants.per_image={VARIANTS}")
        source = open_stored(stored, digits_train, lambda: pytest.fail("the manifest knows the generator")).source
        taken.append(source.take(requests))
        source.close()
    assert set(taken[0].origins) == {"store"}
    np.testing.assert_array_equal(taken[0].images, taken[1].images)


def test_a_second_call_makes_nothing_and_a_larger_k_only_what_is_new(whole, tmp_path):
    folder = tmp_path / "grown"
    first = fill(folder, variants=1)
    grown = fill(folder)
    assert (grown.made, grown.there) == (2 * first.made, first.made)
    again = fill(folder)
    assert (again.made, again.there) == (0, again.total)
    assert contents(folder) == contents(whole[0]), "another cut into batches, equal bytes"


def test_shards_together_are_the_whole_bit_for_bit(whole, tmp_path):
    images = 1437
    parts = [Shard(part, 5).rows(images) for part in range(5)]
    assert [row for part in parts for row in part] == list(range(images))
    # The shards 9 to 11 of 72 are the shard 3 of 24.
    for part in (9, 10, 11):
        fill(tmp_path / "cut", shard=Shard(part, 72), rows=7)
    assert contents(tmp_path / "cut") == contents(whole[0])


def test_a_server_makes_the_same_bytes(whole, tmp_path):
    done = fill(tmp_path / "online", "variants.source=online")
    assert done.made == done.total
    assert done.generator_seconds > 0
    assert contents(tmp_path / "online") == contents(whole[0])


@pytest.mark.parametrize("served", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_store_under_a_former_fingerprint_is_filled_up(tmp_path, monkeypatch, served):
    """Of a model with a file that is not loaded, which counted when the store was begun."""
    model, part = tmp_path / "model", Shard(3, 200)
    shutil.copytree(BUILTIN / "digits-unclip", model)
    (model / "notes.txt").write_text("mine")
    named = [f"generator.model={model}", "generator.num_inference_steps=1"]
    how = ["variants.source=online", "variants.server=embedded"] if served else []
    with monkeypatch.context() as patch:
        patch.setattr("genssl.generators.diffusion.stable_unclip.fingerprint_model", by_every_file)
        begun = fill(tmp_path / "store", *named, shard=part, variants=1)
        wanted = fill(tmp_path / "wanted", *named, shard=part, variants=2)
    assert fill(tmp_path / "store", *named, *how, shard=part, variants=1).made == 0
    assert fill(tmp_path / "store", *named, *how, shard=part, variants=2).made == begun.made
    assert wanted.made == 2 * begun.made
    assert contents(tmp_path / "store") == contents(tmp_path / "wanted")


def test_a_note_beside_a_model_makes_no_other_model_of_it(tmp_path):
    model, part = tmp_path / "model", Shard(3, 200)
    shutil.copytree(BUILTIN / "digits-unclip", model)
    named = [f"generator.model={model}", "generator.num_inference_steps=1"]
    assert fill(tmp_path / "store", *named, shard=part, variants=1).made > 0
    (model / "notes.txt").write_text("mine")
    assert fill(tmp_path / "store", *named, shard=part, variants=1).made == 0


def by_every_file(folder, files, *facts, keep_order=()):
    from genssl.generators.fingerprint import Fingerprint

    digest = fingerprint_folder(folder, *facts)
    return Fingerprint(digest, lambda: digest)


def test_a_run_under_a_former_fingerprint_goes_on(tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(BUILTIN / "digits-unclip", model)
    (model / "notes.txt").write_text("mine")
    recipe = recipe_of(f"generator.model={model}", "generator.num_inference_steps=1", "train.batch_size=480")
    with monkeypatch.context() as patch:
        patch.setattr("genssl.generators.diffusion.stable_unclip.fingerprint_model", by_every_file)
        whole = run(recipe, tmp_path / "whole", RunProgress(Console(quiet=True)))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in ("results.json", "report.html"):
        (tmp_path / "resumed" / name).unlink()
    resumed = run(recipe, tmp_path / "resumed", RunProgress(Console(quiet=True)), resume=True)
    fingerprints = [each["provenance"]["variants"]["fingerprint"] for each in (whole, resumed)]
    assert fingerprints[0] == fingerprints[1]


def test_what_was_interrupted_is_gone_on_with(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "cut", report=Told(stop_after=4))
    told = Told()
    rest = fill(tmp_path / "cut", report=told)
    assert told.first is not None
    assert told.first.there == 4 * 16, "a batch that was reported is stored"
    assert rest.made == rest.total - 4 * 16
    assert contents(tmp_path / "cut") == contents(whole[0])


def test_damaged_records_are_made_again_when_they_are_checked(whole, tmp_path):
    folder = tmp_path / "damaged"
    fill(folder)
    (data,) = folder.glob("writers/*/data.mdb")
    with VariantStore(folder, readonly=True) as store:
        digest = next(store.digests())
        image = store.get(digest).tobytes()
    content = data.read_bytes()
    assert image in content
    # Everywhere, since pages that LMDB has copied keep their old content until they are used again.
    data.write_bytes(content.replace(image, bytes([image[0] ^ 1]) + image[1:]))
    assert fill(folder).made == 0
    assert fill(folder, check=True).made == 1
    assert contents(folder) == contents(whole[0])


def test_a_store_of_another_generator_is_refused_and_left_alone(tmp_path):
    other = b"o" * 16
    VariantStore(tmp_path / "pinned", fingerprint=other, pin=True).close()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=rf"is pinned to the generator fingerprint {other.hex()}"):
        fill(tmp_path / "pinned")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_no_store_is_refused_before_the_generator_loads(tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"is not a variant store"):
        fill(tmp_path, "generator.model=builtin:nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_generator_that_cannot_be_had_leaves_no_store(tmp_path):
    with pytest.raises(UserError, match="no built-in model 'nothing'"):
        fill(tmp_path / "store", "generator.model=builtin:nothing")
    assert not (tmp_path / "store").exists()


def test_shards_are_named_by_option_or_by_torchrun(monkeypatch):
    assert parse_shard("2/4") == Shard(2, 4)
    assert parse_shard(None) == Shard(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse_shard(None) == Shard(1, 2)
    assert parse_shard("0/3") == Shard(0, 3), "what is said wins"
    for wrong in ("4/4", "1", "-1/4", "a/b", "1/0"):
        with pytest.raises(UserError, match="0/4, 1/4, 2/4 and 3/4 for four"):
            parse_shard(wrong)


# ---- Training from what was made ----


def quietly(recipe: Recipe, out: Path) -> dict:
    with (out.parent / f"{out.name}.txt").open("w") as text, RunProgress(Console(file=text, width=200)) as progress:
        return run(recipe, out, progress)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store with all variants 0..1 of the digits, and an in-process run that made the same for itself."""
    folder = tmp_path_factory.mktemp("training")
    settings = ["variants.per_image=2", "variants.buckets=[64]"]
    pregenerate(recipe_of(*settings), folder / "store", variants=2, report=Told())
    return folder / "store", settings, quietly(recipe_of(*settings), folder / "run"), folder / "run"


def same_weights(a: Path, b: Path) -> bool:
    one, other = load_file(a / "encoder.safetensors"), load_file(b / "encoder.safetensors")
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_stored_run_equals_the_run_in_process_bit_for_bit(filled, tmp_path):
    store, settings, in_process, out = filled
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    results = quietly(recipe_of(*settings, "variants.source=stored", f"variants.store={store}"), tmp_path / "stored")
    assert same_weights(out, tmp_path / "stored")
    ledger, made = results["ledger"], in_process["ledger"]
    assert ledger["variants_from_store"] == made["variants_generated"] == 11 * 128
    assert (ledger["variants_generated"], ledger["fallbacks_to_real"], ledger["calls"]) == (0, 0, 0)
    assert ledger["distinct_variants"] == made["distinct_variants"]
    said = results["provenance"]["variants"]
    assert said["source"] == "stored"
    assert said["fingerprint"] == in_process["provenance"]["variants"]["fingerprint"]
    assert said["parameters"] == in_process["provenance"]["variants"]["parameters"]
    assert said["store"]["path"] == str(store)
    assert said["store"]["records"] == 2 * 1437
    assert said["store"]["manifest"]["generators"][said["fingerprint"]]["licence"] == "Apache-2.0"
    after = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert {path: time for path, time in after.items() if path.suffix != ".mdb" or path.name == "data.mdb"} == {
        path: time for path, time in before.items() if path.suffix != ".mdb" or path.name == "data.mdb"
    }, "reading changes nothing but LMDB's table of readers"


@pytest.mark.slow
def test_an_online_run_over_a_full_store_asks_the_server_for_nothing(filled, tmp_path):
    store, settings, _, out = filled
    recipe = recipe_of(*settings, "variants.source=online", f"variants.store={store}")
    results = quietly(recipe, tmp_path / "online")
    assert same_weights(out, tmp_path / "online"), "the control: equal bytes, equal run"
    ledger = results["ledger"]
    assert ledger["variants_from_store"] == 11 * 128
    assert (ledger["calls"], ledger["bytes_received"], ledger["variants_generated"]) == (0, 0, 0)
    assert results["provenance"]["variants"]["source"] == "online"
    assert results["provenance"]["variants"]["store"]["path"] == str(store)


@pytest.mark.slow
def test_what_an_online_run_receives_is_stored_and_serves_the_next_run(filled, tmp_path):
    store, settings, _, out = filled
    recipe = recipe_of(*settings, "variants.source=online", f"variants.store={tmp_path / 'new'}")
    first = quietly(recipe, tmp_path / "first")["ledger"]
    assert same_weights(out, tmp_path / "first")
    assert first["variants_generated"] == 11 * 128
    written, reference = contents(tmp_path / "new"), contents(store)
    assert len(written) >= first["distinct_variants"]
    assert written.items() <= reference.items(), "as if made ahead"
    stored = recipe_of(*settings, "variants.source=stored", f"variants.store={tmp_path / 'new'}")
    again = quietly(stored, tmp_path / "again")["ledger"]
    assert (again["variants_generated"], again["variants_from_store"]) == (0, 11 * 128)


def test_missing_variants_end_a_run_before_it_writes_anything(filled, tmp_path):
    store, settings, _, _ = filled
    recipe = recipe_of(
        *settings, "variants.per_image=4", "variants.source=stored", f"variants.store={store}", "train.epochs=2"
    )
    with pytest.raises(StoreError) as caught:
        quietly(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = re.search(r"lacks ([\d,]+) of the ([\d,]+) variants that this run plans", str(caught.value))
    lacking, planned = (int(number.replace(",", "")) for number in found.groups())
    assert 0.4 * planned < lacking < 0.6 * planned, "two of four indices are there"
    assert f"genssl pregenerate RECIPE --store {store} --variants 4" in str(caught.value)


def test_missing_variants_can_be_real_images_and_are_counted(filled, tmp_path):
    store, settings, _, _ = filled
    common = [*settings, "variants.per_image=8", "variants.source=stored", f"variants.store={store}"]
    results = quietly(recipe_of(*common, "variants.missing=real"), tmp_path / "real")
    ledger = results["ledger"]
    assert ledger["variants_from_store"] + ledger["fallbacks_to_real"] == 11 * 128
    assert 0.65 < ledger["fallbacks_to_real"] / (11 * 128) < 0.85
    assert results["provenance"]["variants"]["source"] == "stored, mostly real images"
    assert results["provenance"]["variants"]["missing"] == "real"


def test_missing_variants_can_be_made_and_stay_in_the_store(filled, tmp_path):
    _, settings, _, out = filled
    recipe = recipe_of(*settings, "variants.source=stored", "variants.missing=generate", f"variants.store={tmp_path}/s")
    first = quietly(recipe, tmp_path / "first")["ledger"]
    assert first["variants_generated"] == 11 * 128
    second = quietly(recipe, tmp_path / "second")["ledger"]
    assert (second["variants_generated"], second["variants_from_store"]) == (0, 11 * 128)
    assert same_weights(out, tmp_path / "first")
    assert same_weights(out, tmp_path / "second")


# ---- Killed, as a process ----

# Imports everything once, then forks a child for every line of input, which fills the store that the line names. It
# tells the child's number, its being ready, and how it ended: a start costs a tenth of a second instead of three.
NURSERY = """
import os, sys
from pathlib import Path
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.generators.diffusion import stable_unclip
from genssl.offline.pregenerate import Shard, pregenerate

class Report:
    def note(self, text): pass
    def start(self, done): print("ready", flush=True)
    def advance(self, done): pass

recipe = load(Recipe, sys.argv[1], sys.argv[5:])
print("open", flush=True)
child = None
for line in sys.stdin:
    if child is not None:
        os.waitpid(child, 0)
    child = os.fork()
    if child == 0:
        pregenerate(recipe, Path(line.strip()), variants=int(sys.argv[4]), report=Report(),
                    shard=Shard(int(sys.argv[2]), int(sys.argv[3])), rows=16)
        os._exit(0)
    print("child", child, flush=True)
    # The child stays a zombie until the next line, so that its number cannot become another process's meanwhile.
    end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    print("ended", end.si_status if end.si_code == os.CLD_KILLED else -end.si_status, flush=True)
"""


class Nursery:
    def __init__(self) -> None:
        command = [sys.executable, "-c", NURSERY, str(RECIPE), str(PART.index), str(PART.count), str(VARIANTS)]
        self.process = subprocess.Popen(
            [*command, *QUICK, *EXACT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout.readline() == "open\n"

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def fill(self, folder: Path, *, kill_after: float | None = None, from_start: bool = False) -> tuple[int, float]:
        """Fills a store; kills the child so many seconds after it is ready, or after its start.

        Returns:
            How it ended, and how long it ran from there.
        """
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        child, ready, began = None, False, time.monotonic()
        while True:
            word, *number = self.process.stdout.readline().split()
            if word == "child":
                child = int(number[0])
            elif word == "ready":
                ready, began = True, time.monotonic()
            else:
                return int(number[0]), time.monotonic() - began
            if kill_after is not None and child is not None and (from_start or ready):
                time.sleep(kill_after)
                os.kill(child, signal.SIGKILL)
                kill_after = None


def kill_and_go_on(reference: Path, folder: Path, times: int) -> tuple[int, int]:
    """Kills the filling `times` times, a new store whenever one is full; returns kills that hit, and stores."""
    draws = random.Random(4)
    expected = contents(reference)
    hits, number = 0, 0
    with Nursery() as nursery:
        status, seconds = nursery.fill(folder / "timing")
        assert status == 0
        for attempt in range(times):
            store = folder / f"killed-{number}"
            early = attempt % 5 == 4
            status, _ = nursery.fill(store, kill_after=draws.uniform(0, seconds * 0.3), from_start=early)
            hits += status == signal.SIGKILL
            if not (store / "store.json").exists():
                continue  # killed before it began
            found = contents(store)
            assert found.items() <= expected.items(), "nothing wrong was ever published"
            if status == 0:
                assert found == expected
                number += 1
        last = folder / f"killed-{number}"
        assert nursery.fill(last)[0] == 0
    assert contents(last) == expected, "resumed, it equals what was never interrupted"
    for store in range(number + 1):
        assert_clean(folder / f"killed-{store}")
    return hits, number + 1


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(whole, tmp_path):
    hits, _ = kill_and_go_on(whole[0], tmp_path, 3)
    assert hits >= 2


@pytest.mark.slow
def test_killed_fifty_times_nothing_is_lost(whole, tmp_path):
    started = time.monotonic()
    hits, stores = kill_and_go_on(whole[0], tmp_path, 50)
    print(f"{hits} of 50 kills hit, over {stores} stores, in {time.monotonic() - started:.0f} s")
    assert hits >= 40


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "genssl", "pregenerate", str(RECIPE), *QUICK, *EXACT]
    command += ["--store", "st ore", "--variants", "10", "--rows", "16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "14,370 variants, 0 of them are there already\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    stored = int(re.search(r"([\d,]+) of 14,370 variants are stored and stay so", output)[1].replace(",", ""))
    assert stored > 0
    assert "genssl pregenerate" in output
    assert "--store 'st ore' --variants 10" in output
    with VariantStore(tmp_path / "st ore", readonly=True) as store:
        assert stored <= len(store) <= stored + 16
        assert np.asarray(store.get(next(store.digests()))).shape == (3, 8, 8)
