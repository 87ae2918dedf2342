"""The command line as a user meets it: exit codes, messages, and nothing left behind by a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from genssl import __version__
from genssl.config.documents.document import parse_document, read_document
from genssl.config.documents.dump import to_yaml
from genssl.config.load import load, model_of
from genssl.config.recipe import Recipe
from genssl.config.validate import validate

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "simclr_sd.yaml")
GENERATOR_RECIPE = str(ROOT / "recipes" / "generators" / "digits_unclip.yaml")


@pytest.fixture
def genssl(tmp_path):
    """Returns a function that runs genssl in the test's folder and sees to it that nothing there is changed."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        before = snapshot(tmp_path)
        done = subprocess.run(
            [sys.executable, "-m", "genssl", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert snapshot(tmp_path) == before
        return done

    return call


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Returns every path below `folder` with its content (None for a folder)."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """A mistake: exit code 2, the message alone on standard error, standard output empty."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"genssl: {message}")


# ---- Mistakes ----


@pytest.mark.parametrize("command", ["run", "preview", "validate"])
def test_an_unknown_key_in_an_override(genssl, command):
    done = genssl(command, RECIPE, "train.epoch=5")
    assert_refused(done, "override 'train.epoch=5': train.epoch: unknown key; did you mean 'epochs'? allowed: ")
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_key_in_an_override_of_a_generator_recipe(genssl):
    done = genssl("train-generator", GENERATOR_RECIPE, "denoiser.step=5")
    assert_refused(done, "override 'denoiser.step=5': denoiser.step: unknown key; did you mean 'steps'? allowed: ")


def test_all_mistakes_are_shown_one_a_line(genssl):
    done = genssl("run", RECIPE, "train.epochs=0", "evaluate.0.k=0", "optimizer.name=adam")
    assert_refused(done, "override 'evaluate.0.k=0': evaluate.0.k: 0: ")
    assert [line.removeprefix("genssl: ").split(": ")[0] for line in done.stderr.splitlines()] == [
        "override 'evaluate.0.k=0'",
        "override 'optimizer.name=adam'",
        "override 'train.epochs=0'",
    ]


@pytest.mark.parametrize("command", ["run", "train-generator", "serve-generator"])
def test_a_missing_file(genssl, command):
    assert_refused(genssl(command, "nowhere.yaml"), "nowhere.yaml: no such file (no YAML file lies in .)")


def test_a_missing_file_suggests_its_neighbour(genssl, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: x\n")
    assert_refused(genssl("run", "mini.yaml"), "mini.yaml: no such file; did you mean 'mine.yaml'? allowed: mine.yaml")


def test_a_run_directory_that_holds_a_run_is_left_alone(genssl, tmp_path):
    directory = tmp_path / "runs" / "first"
    directory.mkdir(parents=True)
    (directory / "results.json").write_text("{}")
    done = genssl("run", RECIPE, "--out", "runs/first")
    assert_refused(done, "runs/first holds a run already; give another directory with --out, or remove it")


def test_a_failed_start_without_out_leaves_no_folder(genssl):
    done = genssl("run", RECIPE, "variants.source=stored", "variants.store=nowhere")
    assert_refused(done, "variants.store: nowhere does not exist; make it: ")


@pytest.mark.parametrize(
    "command",
    [
        ["run"],
        ["preview"],
        ["plan", "--images", "9", "--generator-rate", "1", "--trainer-rate", "1"],
        ["pregenerate", "--store", "variants", "--variants", "1"],
        ["evaluate-generator"],
        ["show"],
        ["validate"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_takes_a_recipe_takes_the_name_of_a_shipped_one(genssl, command):
    done = genssl(*command, "cifar10/simclr", "train.epochs=none")
    assert_refused(done, "override 'train.epochs=none': train.epochs: 'none': ")
    done = genssl(*command, "cifar10/simlcr")
    assert_refused(
        done, "cifar10/simlcr: no such file (the folder cifar10 does not exist); genssl has a recipe cifar10/"
    )


@pytest.mark.parametrize(
    ("command", "name", "setting", "problem"),
    [
        ("compare", "studies/methods", "train.epochs=none", "arm simclr-none: override 'train.epochs=none': "),
        ("train-generator", "generators/digits_flow", "flow.steps=none", "override 'flow.steps=none': flow.steps: "),
    ],
)
def test_so_do_those_that_take_other_kinds(genssl, command, name, setting, problem):
    assert problem in genssl(command, name, setting).stderr


@pytest.mark.parametrize(
    "command",
    [["evaluate"], ["similarity", RECIPE], ["convert-weights", "--features", "a.pth", "--out", "o"]],
    ids=lambda command: command[0],
)
def test_a_recipe_where_weights_are_expected(genssl, command):
    done = genssl(*command, RECIPE)
    assert done.returncode == 2
    assert f"{RECIPE}: is a recipe of a training run, and a" in done.stderr
    assert done.stderr.endswith(f"is expected here; the command for it is: genssl run {RECIPE}\n")


def test_an_address_that_begins_with_a_bracket_needs_no_quotes(genssl):
    done = genssl("show", RECIPE, "variants.server=[::1]:50051")
    assert "server: '[::1]:50051'" in done.stdout
    done = genssl("show", RECIPE, "variants.server=[[::1]:50051,127.0.0.1:50052]")
    assert parse_document(done.stdout, "shown").data["variants"]["server"] == ["[::1]:50051", "127.0.0.1:50052"]


def begun(folder: Path, *settings: str) -> Path:
    """A run directory as far as the command line looks at it."""
    folder.mkdir()
    recipe = load(Recipe, RECIPE, ["variants.source=none", *settings])
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    return folder


def test_resume_takes_settings_and_says_which_can_be_changed(genssl, tmp_path):
    begun(tmp_path / "run")
    done = genssl("run", "--resume", "run", "optimizer.lr=0.5", "train.epochs=40")
    assert_refused(done, "--resume run: was begun with another recipe: optimizer.lr 0.002 (now: 0.5). Of a run ")
    assert "only train.epochs can be changed" in done.stderr
    assert "start another run (genssl run run/recipe.yaml KEY=VALUE --out DIR)" in done.stderr
    done = genssl("run", "--resume", "run", "train.epoch=4")
    assert_refused(done, "override 'train.epoch=4': train.epoch: unknown key")


def test_a_setting_in_place_of_the_recipe(genssl):
    assert_refused(genssl("run", "train.epochs=4"), "train.epochs=4: is a setting, and no file of that name is there; ")


def test_a_preview_is_a_png(genssl):
    done = genssl("preview", RECIPE, "--out", "picture.jpg")
    assert_refused(done, "--out picture.jpg: the picture is a PNG; give a name that ends in .png")


def test_an_unknown_kind_to_list(genssl):
    done = genssl("list", "method")
    allowed = "backbones, datasets, evaluators, generators, methods"
    assert_refused(done, f"list: 'method' is not a kind; did you mean 'methods'? allowed: {allowed}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run"], "Missing argument 'RECIPE'"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["run", RECIPE, "--bogus"], "No such option: --bogus"),
        (["validate"], "Missing argument"),
        (["list", "methods", "backbones"], "unexpected extra argument"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(Path(word).name for word in value),
)
def test_a_wrong_command_line(genssl, arguments, complaint):
    done = genssl(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


# ---- show ----


@pytest.mark.parametrize("path", [GENERATOR_RECIPE, str(ROOT / "servers" / "digits_unclip.yaml")])
def test_show_takes_every_kind_of_file(genssl, path):
    shown = parse_document(genssl("show", path).stdout, "shown")
    original = read_document(path)
    assert model_of(shown) is model_of(original)
    assert validate(model_of(shown), shown) == validate(model_of(original), original)


def test_show_prints_a_recipe_that_is_the_same_recipe(genssl):
    done = genssl("show", RECIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert validate(Recipe, parse_document(done.stdout, "shown")) == load(Recipe, RECIPE)


def test_show_applies_overrides_and_fills_in_defaults(genssl):
    overrides = ["train.epochs=7", "evaluate=[knn]", "variants.per_image=10", "optimizer={lr: 1e-4}", "name='007'"]
    done = genssl("show", RECIPE, *overrides)
    assert (done.returncode, done.stderr) == (0, "")
    document = parse_document(done.stdout, "shown")
    assert document.data["train"]["epochs"] == 7
    assert document.data["name"] == "007"
    assert document.data["evaluate"] == [{"name": "knn", "k": 20, "temperature": 0.07}]
    assert document.data["optimizer"]["name"] == "sgd", "the override replaced the whole block"
    assert validate(Recipe, document) == load(Recipe, RECIPE, overrides)


# ---- validate ----


def test_validate_tells_the_kinds_of_files_apart(genssl, tmp_path):
    (tmp_path / "server.yaml").write_text("generators:\n- {name: stable_unclip, model: some/model}\n")
    done = genssl("validate", RECIPE, GENERATOR_RECIPE, "server.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{RECIPE}: valid", f"{GENERATOR_RECIPE}: valid", "server.yaml: valid"]


def test_validate_names_the_bad_file_and_passes_the_others(genssl, tmp_path):
    (tmp_path / "bad.yaml").write_text(Path(RECIPE).read_text().replace("\nseed: 0\n", "\nsed: 0\n"))
    (tmp_path / "good.yaml").write_text(Path(RECIPE).read_text())
    done = genssl("validate", "good.yaml", "bad.yaml", RECIPE)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["good.yaml: valid", f"{RECIPE}: valid"]
    (line,) = done.stderr.splitlines()
    number = Path(RECIPE).read_text().splitlines().index("seed: 0") + 1
    assert line.startswith(f"genssl: bad.yaml:{number}: sed: unknown key; did you mean 'seed'? allowed: ")


def test_validate_applies_every_override_to_every_file(genssl, tmp_path):
    (tmp_path / "again.yaml").write_text(Path(RECIPE).read_text())
    done = genssl("validate", "seed=1", RECIPE, "train.epochs=5", "again.yaml", "schedule.warmup_epochs=1")
    assert (done.returncode, done.stdout) == (0, f"{RECIPE}: valid\nagain.yaml: valid\n")
    done = genssl("validate", RECIPE, "again.yaml", "train.epochs=1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2, "warm-up is too long now in both"


def test_validate_warns_of_what_splits_batches_and_passes_it(genssl, tmp_path):
    (tmp_path / "server.yaml").write_text(
        "generators:\n- {name: stable_unclip, model: some/model, num_inference_steps: [5, 20]}\n"
    )
    done = genssl("validate", "server.yaml")
    assert (done.returncode, done.stdout) == (0, "server.yaml: valid\n")
    assert done.stderr.startswith("server.yaml: warning: generators.0.num_inference_steps varies between variants")
    assert len(done.stderr.splitlines()) == 1


def test_validate_needs_a_file(genssl):
    assert_refused(genssl("validate", "seed=1"), "validate: no recipe was given, only overrides")


# ---- The rest ----


def test_version(genssl):
    done = genssl("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"genssl {__version__}\n", "")


def test_help_names_every_command(genssl):
    done = genssl("--help")
    assert done.returncode == 0
    for command in ("run", "serve-generator", "train-generator", "preview", "show", "validate", "list"):
        assert f"\n  {command} " in done.stdout


def test_list_shows_every_kind(genssl):
    done = genssl("list")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("methods", "simclr", "backbones", "resnet18", "generators", "stable_unclip", "knn", "digits"):
        assert word in done.stdout.split()
    only = genssl("list", "evaluators")
    assert "knn" in only.stdout.split()
    assert "simclr" not in only.stdout.split()


def test_list_tells_licence_and_cost_when_asked(genssl):
    plain, verbose = genssl("list", "generators"), genssl("list", "generators", "-v")
    assert "licence" not in plain.stdout
    words = " ".join(verbose.stdout.split())
    for said in ("CreativeML OpenRAIL++-M", "48.7 TFLOP an image as unclip-paper", "CC BY-NC 4.0", "0.146 TFLOP"):
        assert said in words
