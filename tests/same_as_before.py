"""Proves that a refactoring changed nothing: collects facts of two trees of genssl and compares them.

    python tests/same_as_before.py REVISION            # against the working tree
    python tests/same_as_before.py REVISION OTHER      # two revisions
    python tests/same_as_before.py REVISION --only variants,wire,help

Every revision gets a temporary git worktree and a fresh process whose PYTHONPATH is that tree; `tree_facts.py` beside
this file says what is collected there. Facts are texts, so that a difference prints as a unified diff. The second tree
also reads what the first one wrote: it verifies the store, evaluates the run and makes it longer, as the first one does
itself. Exit code 0: all facts are equal; 1: some are not, or could not be collected.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tree_facts
from tree_facts import FACTS, Facts

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "diffusers", "transformers", "grpc", "sklearn", "scipy", "numpy", "pydantic", "rich")
LIGHT = {
    "import genssl": ("-c", "import genssl"),
    "genssl --help": ("-m", "genssl", "--help"),
    "genssl list": ("-m", "genssl", "list"),
    "genssl show": ("-m", "genssl", "show", "recipes/simclr_sd.yaml"),
    "genssl validate": ("-m", "genssl", "validate", "recipes/simclr_sd.yaml"),
}


def environment_of(tree: Path) -> dict[str, str]:
    """Returns an environment in which Python imports genssl of a tree, on one thread, with texts of one width."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    terminal = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return {**os.environ, **threads, **terminal, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def checked_out(revision: str | None) -> Iterator[Path]:
    """Gives a worktree of a revision, removed afterwards; of None, the working tree that this file lies in."""
    if revision is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="same-as-before-") as place:
        tree = Path(place).resolve() / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def modules(words: tuple[str, ...], tree: Path) -> set[str]:
    """Returns the modules that a Python command imports where genssl is that of a tree."""
    command = [sys.executable, "-P", "-X", "importtime", *words]
    environment = environment_of(tree)
    told = subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, check=True).stderr
    return {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")}


def imports(tree: Path) -> Facts:
    """Returns which heavy libraries `import genssl` and the light commands load."""
    found: Facts = {}
    for name, words in LIGHT.items():
        loaded = modules(words, tree)
        found[name] = [library for library in HEAVY if library in loaded]
    return found


def facts_of(tree: Path, label: str, names: list[str], work: Path, old: Path) -> dict[str, Facts]:
    """Returns the facts of a tree, collected by a fresh process; in `old` lies what the first tree wrote."""
    print(f"{label}:", file=sys.stderr, flush=True)
    work.mkdir(parents=True)
    command = [sys.executable, "-P", str(tree_facts.__file__), ",".join(names), str(work), str(old)]
    subprocess.run(command, env=environment_of(tree), cwd=work, check=True)
    found: dict[str, Facts] = json.loads((work / "facts.json").read_text())
    return found | ({"imports": imports(tree)} if "imports" in names else {})


def compare(before: dict[str, Facts], after: dict[str, Facts], labels: tuple[str, str]) -> bool:
    """Prints what is equal and a diff of what is not; says whether all is equal and nothing failed."""
    same = True
    for name in before:
        old, new = before[name], after[name]
        different = [key for key in {**old, **new} if old.get(key) != new.get(key) or key == "FAILED"]
        same = same and bool(old) and not different
        print(f"{name}: {len({**old, **new}) - len(different)} of {len({**old, **new})} facts are equal")
        for key in different:
            if key in old and key in new:
                print(f"\n  {name}: {key} differs" if old[key] != new[key] else f"\n  {name}: {key} in both")
            else:
                print(f"\n  {name}: {key} is only in {labels[0] if key in old else labels[1]}")
            texts = [facts.get(key, "") for facts in (old, new)]
            left, right = (text.splitlines() if isinstance(text, str) else text for text in texts)
            lines = [*difflib.unified_diff(left, right, *labels, lineterm="", n=2)]
            print("\n".join(f"    {line}" for line in lines or left))
    return same


def speeds(trees: list[Path], labels: tuple[str, str]) -> None:
    """Prints modules and seconds of the light commands; for information, since a machine's load decides them too."""
    print("\nfor information: imported modules, and median of 5 interleaved runs")
    for name, words in LIGHT.items():
        counts = [len(modules(words, tree)) for tree in trees]
        seconds: list[list[float]] = [[], []]
        for index in [0, 1] * 5:
            begun = time.monotonic()
            command = [sys.executable, "-P", *words]
            tree = trees[index]
            subprocess.run(command, env=environment_of(tree), cwd=tree, capture_output=True, check=True)
            seconds[index].append(time.monotonic() - begun)
        first, second = (statistics.median(one) for one in seconds)
        print(f"  {name}: {counts[0]} -> {counts[1]} modules, {second / first:.2f} of the time of {labels[0]}")


def main() -> int:
    """Reads the command line; returns the exit code."""
    known = {name: (fact.__doc__ or "").strip() for name, fact in FACTS.items()}
    known["imports"] = "Which heavy libraries `import genssl` and the light commands load; how many modules, how long."
    kinds = "\n".join(f"  {name:9} {text}" for name, text in known.items())
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"facts:\n{kinds}", formatter_class=formatter)
    parser.add_argument("revision", help="what was before")
    parser.add_argument("other", nargs="?", help="what it is compared with; by default the working tree")
    parser.add_argument("--only", default=",".join(known), help="facts, separated by commas; by default all")
    parser.add_argument("--keep", type=Path, help="a new folder where stores, runs and facts of both stay")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only: {', '.join(unknown)} is not among {', '.join(known)}")
    if given.keep is not None and given.keep.exists():
        parser.error(f"--keep: {given.keep} exists; give a new folder")
    labels = (given.revision, given.other or "the working tree")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # worktrees and scratch are removed on the way out
    with (
        tempfile.TemporaryDirectory() as scratch,
        checked_out(given.revision) as first,
        checked_out(given.other) as second,
    ):
        place = (given.keep or Path(scratch)).resolve()
        before = facts_of(first, labels[0], names, place / "before", place / "before")
        after = facts_of(second, labels[1], names, place / "after", place / "before")
        same = compare(before, after, labels)
        if "imports" in names:
            speeds([first, second], labels)
    print("\nequal" if same else "\ndifferent")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
