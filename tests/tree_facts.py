"""Facts of one tree of genssl, the one on PYTHONPATH, as texts; `same_as_before.py` compares those of two trees.

    PYTHONPATH=TREE python -P tests/tree_facts.py wire,help,run WORK OLD

Writes WORK/facts.json; stores and runs are made in WORK, and in OLD lie those of the first tree. Only what stays where
it is goes in: the command line, the shipped recipes, the files that commands write, the registries, the stubs, and the
names in `genssl.__all__`. Weights and images are told by their digests.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Facts = dict[str, str | list[str]]  # a text, or its lines
# Of a record of genssl-variants/1: shape and key; shape; what comes before the image. Around the key: checksum, time.
NAMED, SHAPED, HEADER = slice(8, 76), slice(8, 20), 84
GENERATORS = ("simclr_sd", "simclr_flow", "simclr_icgan")
DETERMINISTIC = ("variants.batching=deterministic", "train.threads=1", "train.device=cpu")
EVEN = ("schedule.name=constant", "schedule.warmup_epochs=0")  # such a run can be resumed with another length
RUNS = {  # one for each way that variants reach the training; each with a method of its own
    "in_process": ("simclr_sd", "train.epochs=2", "evaluate=[knn,rankme]", "variants.source=in_process", *EVEN),
    "online": ("digits/byol", "train.epochs=2", "evaluate=[knn]", "variants.source=online", *EVEN),
    "stored": (
        *("digits/moco", "train.epochs=1", "evaluate=[knn,frechet]", "variants.source=stored", *EVEN),
        *("variants.missing=generate", "variants.per_image=1", "variants.store=store-of-the-run"),
    ),
}
TIMED = re.compile(r"second|prefetch_depth|calls|retries")
SHARED = re.compile(r"computed|from_store|_generated|bytes_received")  # of a server's cache, which time decides too
UNSTEADY = {"created", "created_by", "packages"}
DOCUMENTS = ("Recipe", "Study", "ServerFile", "Protocol", "FlowRecipe", "StableUnCLIPRecipe", "ICGANRecipe")


def genssl(*arguments: str, cwd: Path, expected: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Runs the command line of the tree on PYTHONPATH; raises RuntimeError at an exit code that is not expected."""
    done = subprocess.run([sys.executable, "-P", "-m", "genssl", *arguments], cwd=cwd, text=True, capture_output=True)
    if done.returncode not in expected:
        raise RuntimeError(f"genssl {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def digest(data: bytes) -> str:
    """Returns the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def as_text(value: Any) -> str:
    """Returns JSON data as text, without the keys that differ from machine to machine or from day to day."""
    kept = json.loads(json.dumps(value), object_hook=lambda item: {key: item[key] for key in item.keys() - UNSTEADY})
    return json.dumps(kept, indent=1, sort_keys=True)


def tree() -> Path:
    """Returns the folder of the tree that this process imports."""
    return Path(importlib.import_module("genssl").__file__ or "").resolve().parents[1]


# --- what several facts are made of ---


def stored(work: Path, name: str) -> Path:
    """Returns the store of 8 sources x 2 variants of a recipe's generator, made if it is not there yet."""
    store = work / f"store-{name}"
    if not store.exists():
        filled = ("--store", store.name, "--variants", "2", "--shard", "0/179", "variants.source=in_process")
        genssl("pregenerate", str(tree() / f"recipes/{name}.yaml"), *filled, *DETERMINISTIC, cwd=work)
    return store


def trained(work: Path, name: str) -> Path:
    """Returns the directory of one of RUNS, which is trained if it is not there yet."""
    if not (work / name / "results.json").exists():
        first, *settings = RUNS[name]
        genssl("run", str(tree() / f"recipes/{first}.yaml"), *settings, *DETERMINISTIC, "--out", name, cwd=work)
    return work / name


def records(store: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """Yields table, key and value of all that the LMDB files of a store hold, in the order of writers and keys."""
    import lmdb

    for folder in sorted((store / "writers").glob("*")):
        with lmdb.open(str(folder), readonly=True, lock=False, max_dbs=8) as environment:
            with environment.begin() as transaction:
                names = [name for name, _ in transaction.cursor()]
            for name in names:
                table = environment.open_db(name, create=False)
                with environment.begin(table) as transaction:
                    yield from ((name.decode(), key, value) for key, value in transaction.cursor())


def tensors(path: Path) -> list[str]:
    """Returns a line for every tensor of a safetensors file: name, type, shape, digest of its bytes."""
    from safetensors.numpy import load_file

    items = sorted(load_file(path).items())
    return [f"{name} {array.dtype} {array.shape} {digest(array.tobytes())}" for name, array in items]


def log_of(run: Path, left_out: re.Pattern[str] = TIMED) -> list[str]:
    """Returns the rows of a run's metrics.jsonl with all digits, without what the clock decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [f"{row['epoch']} {key} {row[key]!r}" for row in rows for key in row if not left_out.search(key)]


# --- the facts: each takes the work folder and the folder of the first tree's old data ---


def variants(work: Path, _: Path) -> Facts:
    """Fingerprint, and for 8 digits x 2 indices key and image, of the built-in generators."""
    found: Facts = {}
    for name in GENERATORS:
        store = stored(work, name)
        found[f"{name} fingerprint"] = [*json.loads((store / "store.json").read_text())["generators"]]
        found[f"{name} images"] = [
            f"source {value[28:44].hex()} index {int.from_bytes(value[20:28], 'little')} key {key.hex()} "
            f"parameters {value[60:76].hex()} shape {value[SHAPED].hex()} image {digest(value[HEADER:])}"
            for table, key, value in records(store)
            if table == "variants"
        ]
    return found


def store(work: Path, _: Path) -> Facts:
    """Bytes of a store (but for checksum and time of its records), its manifest, and what the store commands make."""
    folder = stored(work, GENERATORS[0])

    def bytes_of(folder: Path) -> list[str]:
        return [
            f"{table} {key.hex()} {digest(value[NAMED] + value[HEADER:] if table == 'variants' else value)}"
            for table, key, value in records(folder)
        ]

    genssl("store", "export", folder.name, "export", "--format", "folder", cwd=work)
    imported = genssl("store", "import", "export", "imported", cwd=work, expected=(0, 2))  # older ones may refuse it
    genssl("store", "merge", "merged", *(stored(work, name).name for name in GENERATORS), cwd=work)
    return {
        "records": bytes_of(folder),
        "manifest": as_text(json.loads((folder / "store.json").read_text())),
        "files": [re.sub(r"writers/[^/]+", "writers/*", path) for path in below(folder)],
        "stats": genssl("store", "stats", folder.name, cwd=work).stdout,
        "exported": [f"{path} {digest((work / 'export' / path).read_bytes())}" for path in below(work / "export")],
        "import": f"{imported.stdout}{imported.stderr}",
        "imported": bytes_of(work / "imported"),
        "merged": bytes_of(work / "merged"),
    }


def below(folder: Path) -> list[str]:
    """Returns the files of a folder, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def run(work: Path, _: Path) -> Facts:
    """Weights, log, numbers, keys and files of short deterministic runs: in process, online, stored."""
    found: Facts = {}
    for name in RUNS:
        folder = trained(work, name)
        results = json.loads((folder / "results.json").read_text())
        left_out = re.compile(f"{TIMED.pattern}|{SHARED.pattern}") if name == "online" else TIMED
        found |= {
            f"{name} weights": tensors(folder / "encoder.safetensors"),
            f"{name} log": log_of(folder, left_out),
            f"{name} metrics": as_text(results["metrics"]),
            f"{name} protocol": as_text(results["protocol"]),
            f"{name} keys of results.json": sorted(line.partition(" = ")[0] for line in flat(results)),
            f"{name} columns": (folder / "metrics.csv").read_text().partition("\n")[0].split(","),
            f"{name} files": below(folder),
            f"{name} recipe.yaml": (folder / "recipe.yaml").read_text(),
        }
    return found


def methods(work: Path, _: Path) -> Facts:
    """Weights and log of one epoch of every registered method, narrowed, without variants."""
    registry = importlib.import_module("genssl.registry").METHODS
    found: Facts = {}
    for name in registry.names():
        fields = registry.config(name).model_fields.items()
        wide = [f"{key}: 128" for key, field in fields if isinstance(field.default, int) and field.default > 128]
        block = f"method={{{', '.join([f'name: {name}', *wide])}}}"
        small = ("backbone.width=8", "train.epochs=1", "evaluate=[]", "variants.source=none", *EVEN, *DETERMINISTIC)
        genssl("run", str(tree() / "recipes/digits/simclr.yaml"), block, *small, "--out", f"method-{name}", cwd=work)
        found[f"{name} weights"] = tensors(work / f"method-{name}" / "encoder.safetensors")
        found[f"{name} log"] = log_of(work / f"method-{name}")
    return found


def old_data(work: Path, old: Path) -> Facts:
    """What this tree makes of the first tree's store and run: verified, evaluated, resumed to three epochs."""
    shutil.copytree(stored(old, GENERATORS[0]), work / "old-store")
    shutil.copytree(trained(old, "in_process"), work / "old-run")
    judged = ("--evaluator", "knn", "--evaluator", "rankme", "--out", "judged", "--device", "cpu")
    genssl("evaluate", "old-run", *judged, cwd=work)
    resumed = genssl("run", "--resume", "old-run", "train.epochs=3", cwd=work, expected=(0, 2))
    return {
        "store verify": genssl("store", "verify", "old-store", cwd=work).stdout,
        "evaluation.json": as_text(json.loads((work / "judged" / "evaluation.json").read_text())),
        "resume": f"exit code {resumed.returncode}\n{resumed.stderr}",
        "resumed weights": tensors(work / "old-run" / "encoder.safetensors"),
        "resumed log": log_of(work / "old-run"),
        "resumed files": below(work / "old-run"),
    }


def wire(_: Path, __: Path) -> Facts:
    """The wire's descriptor: digest, fields and methods."""
    file = importlib.import_module("genssl.generation.v1.generation_pb2").DESCRIPTOR
    proto = importlib.import_module("google.protobuf.descriptor_pb2").FileDescriptorProto.FromString(file.serialized_pb)

    def fields(message: Any, name: str) -> Iterator[str]:
        yield from (f"{name}.{one.name}={one.number}:{one.type} {one.label} {one.type_name}" for one in message.field)
        for nested in message.nested_type:
            yield from fields(nested, f"{name}.{nested.name}")

    enums = [f"{enum.name}.{value.name}={value.number}" for enum in proto.enum_type for value in enum.value]
    calls = [f"{call.name} {call.input_type} {call.output_type}" for one in proto.service for call in one.method]
    lines = [line for message in proto.message_type for line in fields(message, message.name)]
    return {"digest": digest(file.serialized_pb), "fields": lines + enums, "methods": calls}


def help_texts(work: Path, _: Path) -> Facts:
    """The --help of every command and subcommand."""

    def walk(*words: str) -> Iterator[tuple[str, str]]:
        text = genssl(*words, "--help", cwd=work).stdout
        yield " ".join(["genssl", *words]), text
        for command in re.findall(r"^  ([a-z][\w-]*)(?:  |$)", text.partition("\nCommands:\n")[2], re.MULTILINE):
            yield from walk(*words, command)

    return dict(walk())


def schemas(_: Path, __: Path) -> Facts:
    """Keys, types, limits and defaults of every document and block, and apart from them their descriptions."""
    registries = importlib.import_module("genssl.registry").REGISTRIES
    models = {name: model for name in DOCUMENTS if (model := class_of("genssl.config", name)) is not None}
    models |= {f"{kind}/{name}": reg.config(name) for kind, reg in registries.items() for name in reg.names()}
    found: Facts = {"documents": [name for name in models if "/" not in name]}
    for name, model in models.items():
        schema = model.model_json_schema()
        lines = flat(unfolded(schema, schema.get("$defs", {})))
        described = [line for line in lines if ".description = " in f".{line}"]
        found[name] = [line for line in lines if line not in described]
        found[f"{name} descriptions"] = described
    return found


def unfolded(value: Any, definitions: dict[str, Any]) -> Any:
    """Returns a JSON schema with its references filled in and without titles: names of classes do not matter."""
    if isinstance(value, list):
        return [unfolded(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        value = definitions[value["$ref"].rpartition("/")[2]] | value
    said = [(key, item) for key, item in value.items() if key not in ("$ref", "$defs")]
    return {key: unfolded(item, definitions) for key, item in said if key != "title" or isinstance(item, dict)}


def flat(value: Any, path: str = "") -> list[str]:
    """Returns a line "key.path = value" for every leaf of JSON data."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [line for key, item in items for line in flat(item, f"{path}.{key}" if path else str(key))]
    return [f"{path} = {value!r}"]


def class_of(package: str, name: str) -> Any:
    """Returns the class of a name, in whatever module of a package it is defined; None if there is none."""
    folders = importlib.import_module(package).__path__
    for module in sorted(pkgutil.walk_packages(folders, f"{package}."), key=lambda module: module.name):
        found = vars(importlib.import_module(module.name)).get(name)
        if inspect.isclass(found):
            return found
    return None


def recipes(_: Path, __: Path) -> Facts:
    """What `genssl validate` and `genssl show` say of every shipped recipe and server file."""
    found: Facts = {}
    for path in sorted([*tree().glob("recipes/**/*.yaml"), *tree().glob("servers/**/*.yaml")]):
        name = str(path.relative_to(tree()))
        for command in ("validate", "show"):
            done = genssl(command, name, cwd=tree(), expected=(0, 2))
            found[f"{command} {name}"] = f"{done.stdout}{done.stderr}exit code {done.returncode}"
    return found


def listed(work: Path, _: Path) -> Facts:
    """What `genssl list` prints of each kind, and which recipes came with this version."""
    kinds = importlib.import_module("genssl.registry").REGISTRIES
    found: Facts = {kind: genssl("list", kind, "-v", cwd=work).stdout for kind in kinds}
    return found | {"recipes": genssl("recipes", cwd=work).stdout}


def api(_: Path, __: Path) -> Facts:
    """Signatures of the public classes: names, order and defaults of parameters."""

    def plain(function: Callable[..., Any]) -> inspect.Signature:  # annotations name classes, which may be renamed
        told, empty = inspect.signature(function), inspect.Parameter.empty
        parameters = [one.replace(annotation=empty) for one in told.parameters.values()]
        return told.replace(parameters=parameters, return_annotation=empty)

    package = importlib.import_module("genssl")
    found: Facts = {"names": package.__all__}
    for name in package.__all__:
        if inspect.isclass(thing := getattr(package, name)):
            members = inspect.getmembers(thing, inspect.isfunction)
            public = [(key, item) for key, item in members if key == "__init__" or not key.startswith("_")]
            found[name] = [f"{key}{plain(item)}" for key, item in public]
    return found


FACTS: dict[str, Callable[[Path, Path], Facts]] = {
    "wire": wire, "api": api, "list": listed, "help": help_texts, "schemas": schemas,
    "recipes": recipes, "variants": variants, "store": store, "run": run, "old": old_data, "methods": methods,
}  # fmt: skip


def collect(names: list[str], work: Path, old: Path) -> None:
    """Collects facts of the tree on PYTHONPATH into facts.json, in this process; a fact that fails says why."""
    if tree() != Path(os.environ["PYTHONPATH"]):
        sys.exit(f"genssl is imported from {tree()}, not from {os.environ['PYTHONPATH']}")
    found: dict[str, Facts] = {}
    for name in (name for name in FACTS if name in names):
        begun = time.monotonic()
        try:
            found[name] = FACTS[name](work, old)
        except Exception as error:  # the other facts are worth knowing all the same
            found[name] = {"FAILED": f"{type(error).__name__}: {error}".replace(str(work), "WORK")}
        print(f"  {name}: {len(found[name])} facts in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    (work / "facts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    collect(sys.argv[1].split(","), Path(sys.argv[2]), Path(sys.argv[3]))
