"""Distilling a flow: nearer to the teacher than the teacher's own single step, and refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from miniatures import FLOW, judge_little, problems, quiet, recipe

from genssl.config.generator_recipes.flow import DistillationConfig
from genssl.errors import ConfigError, GeneratorError, RequestRefusedError, UserError
from genssl.generator_training.distill import _Consistency, _Teacher, _Trajectory
from genssl.generator_training.rows import Draws
from genssl.generator_training.run import train_generator
from genssl.generators.configs import FlowConfig
from genssl.generators.diffusion.sampling import decode, row_noise
from genssl.generators.flow import Flow, FlowParts, noise_embeddings, velocity
from genssl.generators.models import BUILTIN

CPU = torch.device("cpu")
STUDENT = """
name: student
family: flow
dataset: {name: digits}
distill: {teacher: "builtin:digits-flow", steps: 1, teacher_steps: 4, training_steps: 3, batch_size: 16}
threads: 1
"""


@pytest.fixture(autouse=True)
def little_to_judge(monkeypatch) -> None:
    judge_little(monkeypatch)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generators") / "student"
    with pytest.MonkeyPatch.context() as patch:
        judge_little(patch)
        train_generator(recipe(STUDENT), folder, quiet())
    return folder


def flow(folder: Path | str, **settings) -> Flow:
    return Flow(FlowConfig(model=str(folder), **settings), CPU)


def test_a_student_is_a_flow_that_knows_its_steps(student):
    assert {path.name for path in student.iterdir()} == {
        "unet.safetensors",
        "encoder.safetensors",
        "config.json",
        "card.json",
        "quality.json",
        "README.md",
    }
    generator = flow(student)
    assert generator.spec.defaults["num_inference_steps"] == 1
    with pytest.raises(RequestRefusedError, match="num_inference_steps: 4, but the model was distilled to 1"):
        generator.check(generator.spec.defaults | {"num_inference_steps": 4})
    with pytest.raises(RequestRefusedError, match="guidance built in"):
        generator.check(generator.spec.defaults | {"guidance_scale": 2.0})
    with pytest.raises(GeneratorError, match="distilled to 1; leave it out"):
        flow(student, num_inference_steps=8)
    assert (student / "encoder.safetensors").read_bytes() == (
        BUILTIN / "digits-flow" / "encoder.safetensors"
    ).read_bytes()


def test_it_is_measured_beside_its_teacher(student):
    quality = json.loads((student / "quality.json").read_text())
    assert quality["teacher"]["fixed"] == {"num_inference_steps": 4}
    assert [row["embedding_noise"] for row in quality["teacher"]["settings"]] == [0.0, 0.3, 0.6]
    assert "Its teacher at num_inference_steps 4" in (student / "README.md").read_text()


@pytest.mark.parametrize(
    ("objective", "steps", "part"),
    [
        ("trajectory", 1, 0.6),
        pytest.param("trajectory", 2, 0.9, marks=pytest.mark.slow),
        pytest.param("consistency", 1, 0.6, marks=pytest.mark.slow),
    ],
)
def test_a_student_comes_nearer_to_its_teacher(tmp_path, digits_test, objective, steps, part):
    text = STUDENT.replace(
        "steps: 1, teacher_steps: 4, training_steps: 3",
        f"steps: {steps}, teacher_steps: 4, training_steps: 60, objective: {objective}",
    )
    train_generator(recipe(text), tmp_path / "student", quiet())
    teacher = flow("builtin:digits-flow")
    embeddings = teacher.embed(torch.stack([torch.from_numpy(digits_test.image(row)) for row in range(64)]))

    def made(generator: Flow, steps: int) -> torch.Tensor:
        parameters = generator.spec.defaults | {"num_inference_steps": steps}
        return generator.generate(embeddings, range(64), [parameters] * 64).float()

    wanted = made(teacher, 4)
    before = F.mse_loss(made(teacher, steps), wanted)
    assert F.mse_loss(made(flow(tmp_path / "student"), steps), wanted) < part * before


def test_a_recipe_can_train_a_flow_and_its_student(tmp_path):
    text = FLOW + "distill: {steps: 2, teacher_steps: 4, training_steps: 2, batch_size: 16}\n"
    quality = train_generator(recipe(text), tmp_path / "out", quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert flow(tmp_path / "out").spec.defaults["num_inference_steps"] == 2
    assert quality["teacher"]["fixed"] == {"num_inference_steps": 4}


def test_the_teacher_goes_the_steps_of_its_generator():
    """With guidance: what a student is shown is what the teacher's generator would have made."""
    generator = flow("builtin:digits-flow", num_inference_steps=4, guidance_scale=3.0, embedding_noise=0.4)
    embeddings = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.functional.pad(embeddings, (0, generator.spec.embedding_dim - 64))
    made = generator.generate(embeddings, range(6), [generator.spec.defaults] * 6)
    mixed_in, x = row_noise(range(6), (embeddings.shape[1],), (3, 8, 8))
    condition = noise_embeddings(embeddings, mixed_in, torch.full((6,), 0.4))
    network = FlowParts.load(BUILTIN / "digits-flow").network
    teacher = _Teacher(DistillationConfig(teacher_steps=4, guidance_scale=3.0), network)
    for number in range(4):
        x = teacher.step(x, torch.full((6,), number), condition)
    assert (
        int((decode(lambda part: part, x, 8, 8, whose="it", dtype=torch.float32).int() - made.int()).abs().max()) <= 1
    )


def test_the_losses_are_what_their_formulas_say():
    """Row by row and in float64, for a student of two steps and a teacher of four."""
    network = FlowParts.load(BUILTIN / "digits-flow").network.double()
    config = DistillationConfig(steps=2, teacher_steps=4)
    random = torch.Generator().manual_seed(1)
    noise, clean = (torch.randn(3, 3, 8, 8, generator=random, dtype=torch.float64) for _ in range(2))
    width = network.config["projection_class_embeddings_input_dim"]
    condition = torch.randn(3, width, generator=random, dtype=torch.float64)

    def v(x: torch.Tensor, t: float, row: int) -> torch.Tensor:
        return velocity(network, x[None], torch.tensor([t], dtype=torch.float64), condition[row : row + 1])[0]

    with torch.no_grad():
        found = _Trajectory(config, network).loss(network, noise, clean, condition, Draws("x"))
        squares = []
        for row in range(3):
            x = noise[row]
            for part in (0, 1):
                end = x
                for number in (2 * part, 2 * part + 1):
                    end = end + v(end, number / 4, row) / 4
                squares.append(((x + v(x, part / 2, row) / 2 - end) ** 2).mean())
                x = end
        assert float(found) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)

        found = _Consistency(config, network, network).loss(network, noise, clean, condition, Draws("x"))
        squares = []
        for row, number in enumerate(Draws("x").integers(0, 4, 3).tolist()):
            t, later, end = number / 4, (number + 1) / 4, 0.5 if number < 2 else 1.0
            x = (1 - t) * noise[row] + t * clean[row]
            further = x + v(x, t, row) / 4
            arrived = further + (end - later) * v(further, later, row)
            squares.append(((x + (end - t) * v(x, t, row) - arrived) ** 2).mean())
        assert float(found) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)


# ---- What cannot be ----


def test_the_networks_and_the_numbers_of_a_student_come_from_one_place():
    (said,) = problems(FLOW.replace("conditioner:", "# conditioner:"))
    assert "conditioner: None: the flow needs one; only with a distill.teacher is there one already" in said
    assert "the distill.teacher brings its own; leave this out" in problems(FLOW + "distill: {teacher: x}\n")[0]
    assert (
        "the teacher's 8 steps are not a multiple, 2 or more, of the student's 3"
        in problems(STUDENT.replace("steps: 1, teacher_steps: 4", "steps: 3, teacher_steps: 8"))[0]
    )


def test_a_teacher_that_is_none_is_refused_before_training(tmp_path, student):
    for teacher, message in (
        (str(tmp_path / "nowhere"), "distill.teacher: .* is neither a folder here nor builtin:NAME"),
        ("builtin:digits-icgan", "distill.teacher: there is no built-in model 'digits-icgan'"),
        (str(student), "distill.teacher: .* is a student of 1 steps; give its teacher"),
    ):
        with pytest.raises(UserError, match=message):
            train_generator(recipe(STUDENT.replace('"builtin:digits-flow"', teacher)), tmp_path / "out", quiet())
    dataset = f"{{name: folder, root: {folder_of_images(tmp_path)}, labels: none, image_size: 16}}"
    text = STUDENT.replace("{name: digits}", dataset)
    with pytest.raises(ConfigError, match=r"makes images of 8 pixels; set dataset\.image_size to that"):
        train_generator(recipe(text), tmp_path / "out", quiet())
    assert not (tmp_path / "out").exists()


def folder_of_images(tmp_path: Path) -> Path:
    from PIL import Image

    root = tmp_path / "images"
    root.mkdir()
    for number in range(40):
        Image.new("RGB", (20, 20), (6 * number, 0, 0)).save(root / f"{number}.png")
    return root
