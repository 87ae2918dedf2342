"""Generators trained under torchrun, in bfloat16 and in micro-batches: the training of one process, up to rounding."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from genssl.base.devices import seeded_initialisation
from genssl.base.ranks import Ranks
from genssl.config.documents.document import parse_document
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.load import load
from genssl.config.validate import validate
from genssl.generator_training.family import batch_problems
from genssl.generator_training.loop import Checkpoints, Loop, fit
from genssl.generator_training.rows import Draws
from genssl.generator_training.run import train_generator
from genssl.generator_training.stage_progress import LINES
from genssl.generators.configs import FlowConfig, ICGANConfig, StableUnCLIPConfig
from genssl.generators.models import BUILTIN
from genssl.generators.open import open_generator
from genssl.quality import measures as generator_quality

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CPU = torch.device("cpu")

# At most five steps a stage, of which every loss is printed; batches that divide among two ranks and two micro-batches.
# Sixteen channels in eight groups: a group norm of one channel a group takes away what time and condition add to it,
# and their gradients are rounding alone.
FLOW = """
name: miniature
family: flow
dataset: {name: digits}
conditioner: {backbone: {name: resnet18, stem: small, width: 4}, epochs: 1, projector_hidden_dim: 16}
flow: {block_out_channels: [16, 16], steps: 5, batch_size: 64}
threads: 1
"""
ICGAN = f"""
name: miniature
family: icgan
dataset: {{name: digits}}
conditioner: {{run: {BUILTIN / "digits-icgan"}}}
generator: {{channels: [16, 16], feature_width: 8, noise_chunk: 4, attention: [0]}}
discriminator: {{channels: [16]}}
adversarial: {{steps: 5, batch_size: 32, translation: 0.125, cutout: 0.25}}
threads: 1
"""
STABLE_UNCLIP = """
name: miniature
family: stable_unclip
dataset: {name: digits}
image_encoder: {hidden_size: 16, num_layers: 1, num_heads: 2, embedding_dim: 16, epochs: 1}
autoencoder: {block_out_channels: [8, 8], epochs: 1, batch_size: 256}
denoiser: {block_out_channels: [16, 16], steps: 5}
threads: 1
"""
RECIPES = {"flow": FLOW, "icgan": ICGAN, "stable_unclip": STABLE_UNCLIP}
CONFIGS = {"flow": FlowConfig, "icgan": ICGANConfig, "stable_unclip": StableUnCLIPConfig}
FAMILIES = [
    pytest.param("flow", marks=pytest.mark.slow),
    "icgan",
    pytest.param("stable_unclip", marks=pytest.mark.slow),
]
UNTRAINED = {
    "flow": ["conditioner.lr=1e-12", "flow.lr=1e-12"],
    "icgan": ["adversarial.lr_generator=1e-12", "adversarial.lr_discriminator=1e-12"],
    "stable_unclip": ["image_encoder.lr=1e-12", "autoencoder.lr=1e-12", "denoiser.lr=1e-12"],
}

# What is started: the command line, which judges little and saves its state after every step. It kills itself by
# SIGKILL after the step that MISHAP names as "RANKS STAGE STEP".
SCRIPT = """
import os, signal, sys
from genssl.generator_training import loop as fitting
from genssl.generator_training import run as generator
from genssl.generator_training import stage_progress
from genssl.quality import measures as generator_quality

generator_quality.EFFORTS["quick"], generator_quality.VARIANTS = generator_quality.Effort(40, 200, 1e8), 2
for name, sweep in generator_quality.SWEEPS.items():
    generator_quality.SWEEPS[name] = generator_quality.Sweep(sweep.fixed, sweep.varied[:1])
fitting.Checkpoints.__init__.__defaults__ = (0.0, fitting.ALONE)
mishap, *arguments = sys.argv[1:]
report = stage_progress.StageProgress.__call__


def reported(self, stage, step, *rest):
    if mishap == f"{os.environ.get('RANK', '0')} {stage} {step}" or mishap == f"all {stage} {step}":
        os.kill(os.getpid(), signal.SIGKILL)
    report(self, stage, step, *rest)


stage_progress.StageProgress.__call__ = reported
sys.argv = ["genssl", *arguments]
from genssl.cli.main import main
main()
"""


def start(folder: Path, ranks: int, *arguments: str, mishap: str = "none") -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks > 1 else []
    command = [sys.executable, *launch, str(script), mishap, "train-generator", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=ENVIRONMENT)


def written(folder: Path, family: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(RECIPES[family])
    return file


def judge_little(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(generator_quality.EFFORTS, "quick", generator_quality.Effort(40, 200, 1e8))
    patch.setattr(generator_quality, "VARIANTS", 2)
    for name, sweep in generator_quality.SWEEPS.items():
        patch.setitem(generator_quality.SWEEPS, name, generator_quality.Sweep(sweep.fixed, sweep.varied[:1]))


def train_here(file: Path, folder: Path, *overrides: str) -> str:
    """Trains in this process; returns what was printed."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        judge_little(patch)
        train_generator(load(GeneratorRecipe, file, list(overrides)), folder, Console(file=said))
    return said.getvalue()


def losses(said: str) -> list[tuple[str, float]]:
    """Returns ("STAGE: step N/M", loss) of every fifth of a stage; a slow machine says more of it."""
    lines = re.findall(r"^(\w+: step (\d+)/(\d+)), loss ([\d.]+)", said, re.MULTILINE)
    assert lines
    return [
        (stage, float(loss))
        for stage, step, steps, loss in lines
        if int(step) * LINES // int(steps) > (int(step) - 1) * LINES // int(steps)
    ]


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def way_apart(one: Path, other: Path, untrained: Path) -> dict[str, float]:
    """Returns how far two results of a training are apart, in parts of the way that the first one went, by file."""

    def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
        assert first.keys() == second.keys()
        squares = [(first[name].double() - second[name].double()).square().sum() for name in first]
        return float(torch.stack(squares).sum().sqrt())

    first, second, start = weights(one), weights(other), weights(untrained)
    assert first.keys() == second.keys()
    apart = {name: distance(first[name], second[name]) for name in first}
    return {name: apart[name] and apart[name] / distance(first[name], start[name]) for name in first}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[..., tuple[Path, str]]:
    """Returns a function that trains a family in this process, once: (folder, what was printed)."""

    @functools.cache
    def train(family: str, *overrides: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("alone")
        return folder / "model", train_here(written(folder, family), folder / "model", *overrides)

    return train


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Callable[..., tuple[Path, str]]:
    """Returns a function that trains a family by two ranks, once: (folder, what was printed)."""

    @functools.cache
    def train(family: str, *overrides: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("together")
        done = start(folder, 2, str(written(folder, family)), *overrides, "--out", str(folder / "model"))
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in folder.iterdir()) == ["model", "recipe.yaml", "script.py"]
        return folder / "model", done.stdout

    return train


# ---- Two ranks against one process ----


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_what_one_process_trains(alone, together, family):
    """The distance between the two results is far below the one that training covered.

    It is more than rounding of the weights: Adam divides a gradient by its own size, and where the gradient is zero but
    for rounding (the bias of an attention's keys), it still goes a step. So some weights differ by a learning rate, and
    all together by 4 % of their way at most; two trainings on different draws would differ by about the whole of it.
    """
    (one, said), (two, said_together) = alone(family), together(family)
    assert said_together.count("model: written") == 1, "the first rank alone speaks"
    (stages, values), (same_stages, others) = (zip(*losses(text), strict=True) for text in (said, said_together))
    assert stages == same_stages
    for stage, value, other in zip(stages, values, others, strict=True):
        first = ": step 1/" in stage  # weights and draws are the same; four decimals are printed
        assert value == pytest.approx(other, abs=1.1e-4 if first else 0, rel=0 if first else 1e-2), stage
    assert {path.relative_to(one) for path in one.rglob("*")} == {path.relative_to(two) for path in two.rglob("*")}
    ways = way_apart(one, two, alone(family, *UNTRAINED[family])[0])
    assert max(ways.values()) <= 0.1, ways


@pytest.mark.slow
@pytest.mark.parametrize("family", list(RECIPES))
def test_two_ranks_train_in_bfloat16_and_micro_batches_as_one_process_does(alone, together, family):
    overrides = ["precision=bf16", "channels_last=true", "accumulate=2"]
    (one, said), (two, said_together) = alone(family, *overrides), together(family, *overrides)
    for (stage, value), (same_stage, other) in zip(losses(said), losses(said_together), strict=True):
        assert stage == same_stage
        assert value == pytest.approx(other, rel=3e-2), stage
    ways = way_apart(one, two, alone(family, *UNTRAINED[family])[0])
    assert max(ways.values()) <= 0.5, ways


# ---- Errors ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adversarial.batch_size=33", "adversarial.batch_size: 33 does not divide among 2 ranks into equal parts"),
        ("adversarial.steps=5", "model exists already"),  # which the first rank alone looks for
    ],
)
def test_an_error_ends_both_ranks_with_one_message_and_leaves_nothing(tmp_path, override, message):
    file, folder = written(tmp_path, "icgan"), tmp_path / "model"
    if "exists" in message:
        folder.mkdir()
    before = sorted([*tmp_path.iterdir(), tmp_path / "script.py"])
    started = time.monotonic()
    done = start(tmp_path, 2, str(file), override, "--out", str(folder))
    assert time.monotonic() - started < 120
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("genssl: ")]
    assert len(told) == 1
    assert message in told[0]
    assert "exitcode  : 2 " in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("size", "accumulate", "ranks", "problem"),
    [
        (32, 2, 4, None),
        (32, 1, 3, "flow.batch_size: 32 does not divide among 3 ranks into equal parts of at least 2"),
        (8, 2, 4, "8 does not divide among 2 micro-batches (accumulate) and 4 ranks into equal parts of at least 2"),
        (200, 1, 2, "flow.batch_size: 200 is more than the 100 training images"),
    ],
)
def test_batches_divide_among_ranks_and_micro_batches(size, accumulate, ranks, problem):
    recipe = validate(GeneratorRecipe, parse_document(f"{FLOW}accumulate: {accumulate}\n", "miniature.yaml"))
    problems = batch_problems(recipe, 100, Ranks(rank=0, size=ranks), flow=size)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


# ---- A step ----


def fitted(folder: Path, accumulate: int) -> list[torch.Tensor]:
    """Fits a network to a curve, in float64; returns its weights."""
    folder.mkdir()
    with seeded_initialisation("curve"):
        network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        x = rows.double().view(-1, 1) / 24
        return (network(x) - x.square()).square().mean()

    loop = Loop(CPU, Checkpoints(folder), accumulate=accumulate)
    lengths = SimpleNamespace(batch_size=8, lr=1e-2)
    fit("curve", network, loss_of, lengths, Draws("curve"), loop, count=24, steps=10)
    return list(network.parameters())


def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path):
    for one, other in zip(fitted(tmp_path / "1", 1), fitted(tmp_path / "2", 2), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


# Gradients of a mean over rows in two micro-batches, with batch norm in bfloat16 beside it; saved by every rank.
GRADIENTS = """
import sys
from pathlib import Path
import torch
from torch import nn
from genssl.base.devices import seeded_initialisation, stream
from genssl.base.ranks import joined
from genssl.generator_training.loop import Checkpoints, Loop

out, cpu = Path(sys.argv[1]), torch.device("cpu")
with joined() as ranks, seeded_initialisation("network"):
    loop = Loop(cpu, Checkpoints(out, ranks=ranks), ranks=ranks, channels_last=True, accumulate=2)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)).double()
    network.append(nn.Linear(2, 2).double().requires_grad_(False))
    norm = nn.BatchNorm2d(3, affine=False)
    images = torch.randn(16, 3, 6, 6, generator=stream("images"), dtype=torch.float64)
    loop.prepare(network)
    loop.prepare(norm)
    normal = []
    for rows in loop.parts(torch.arange(16)):
        (network(images[rows]).square().mean() / 2).backward()
        normal.append(norm((5 + images[rows]).bfloat16()))
    loop.average_gradients(network)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    found = {"gradients": gradients, "normal": normal, "norm": norm.state_dict()}
    torch.save(found, out / f"{ranks.size}-{ranks.rank}.pt")
"""


@pytest.mark.slow
def test_gradients_and_batch_norms_of_two_ranks_are_those_of_one_process(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for command in ([], launch):
        done = subprocess.run(
            [sys.executable, *command, str(script), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=ENVIRONMENT,
        )
        assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for whole, of_first, of_second in zip(one["gradients"], first["gradients"], second["gradients"], strict=True):
        assert torch.equal(of_first, of_second)
        assert torch.allclose(whole, of_first, rtol=1e-12, atol=1e-15)
    for whole, *halves in zip(one["normal"], first["normal"], second["normal"], strict=True):
        assert torch.cat(halves).dtype == whole.dtype == torch.bfloat16
        assert torch.allclose(whole.float(), torch.cat(halves).float(), rtol=1e-2, atol=1e-2)
    for name, value in one["norm"].items():
        assert torch.allclose(value, first["norm"][name], rtol=1e-5), name
        assert torch.equal(first["norm"][name], second["norm"][name]), name


# ---- Precision and memory order ----


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_trains_weights_of_float32_that_are_near(alone, digits_test, family):
    """Nearer to the result of float32 than the start is, in one process, with convolutions in channels_last.

    Early gradients of a deep net with batch norm differ by a percent for a rounding of float32, by much for bfloat16.
    """
    folder, said = alone(family, "precision=bf16", "channels_last=true")
    for (stage, value), (same_stage, other) in zip(losses(said), losses(alone(family)[1]), strict=True):
        assert stage == same_stage
        assert value == pytest.approx(other, rel=2e-1 if family == "icgan" else 5e-2), stage  # two that compete
    numbers = {value.dtype for file in weights(folder).values() for value in file.values()}
    assert numbers <= {torch.float32, torch.int64}  # batch norm counts its batches
    ways = way_apart(alone(family)[0], folder, alone(family, *UNTRAINED[family])[0])
    assert max(ways.values()) > 0
    assert max(ways.values()) < 1, ways
    generator = open_generator(CONFIGS[family](model=str(folder)), CPU)
    embeddings = generator.embed(torch.from_numpy(digits_test.image(0)[None]))
    assert generator.generate(embeddings, [7], [generator.spec.defaults]).shape == (1, 3, 8, 8)


# ---- Interruptions ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stage", "more"),
    [("icgan", "icgan", "adversarial.steps=150"), ("stable_unclip", "denoiser", "denoiser.steps=100")],
)
def test_kill_9_in_the_last_stage_changes_nothing_but_the_time(tmp_path, alone, family, stage, more):
    file, folder = written(tmp_path, family), tmp_path / "model"
    arguments = [str(file), more, "--out", str(folder)]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "none", "train-generator", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    checkpoint = tmp_path / ".model.partial" / "model" / f".{stage}.checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    done = start(tmp_path, 1, *arguments)
    assert done.returncode == 0, done.stderr
    check_resumed_as(folder, alone(family, more)[0])


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["all", "1"])
def test_kill_9_of_ranks_changes_nothing_but_the_time(tmp_path, together, killed):
    file, folder = written(tmp_path, "flow"), tmp_path / "model"
    arguments = [str(file), "--out", str(folder)]
    done = start(tmp_path, 2, *arguments, mishap=f"{killed} flow 3")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("genssl: ")]
    assert len(told) == (killed != "all")
    if told:
        assert told[0].startswith("genssl: rank 0 has lost another rank of this run")
        assert "start the same command again" in told[0]
    assert not folder.exists()
    done = start(tmp_path, 2, *arguments)
    assert done.returncode == 0, done.stderr
    assert "flow: step 2/5" not in done.stdout, "of which the state was saved"
    check_resumed_as(folder, together("flow")[0])


def check_resumed_as(folder: Path, whole: Path) -> None:
    assert json.loads((folder / "card.json").read_text())["resumed"] is True
    assert {path.relative_to(folder) for path in folder.rglob("*")} == {
        path.relative_to(whole) for path in whole.rglob("*")
    }
    for path in whole.rglob("*.safetensors"):
        assert path.read_bytes() == (folder / path.relative_to(whole)).read_bytes(), path.name
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
