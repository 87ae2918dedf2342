"""`~` means the home directory wherever a path can be given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from genssl import VariantClient
from genssl.base.home import expand_home
from genssl.client.images import stored_image
from genssl.client.messages import read_token_file
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.load import load, parse_blocks
from genssl.config.recipe import ClientTLSConfig, Recipe
from genssl.config.server import ServerFile
from genssl.data.configs import FolderConfig, ImageNetConfig
from genssl.errors import UserError
from genssl.generators.diffusion.configs import Flux2KleinConfig
from genssl.variants.store.store import VariantStore

ROOT = Path(__file__).resolve().parents[2]
SD = ROOT / "recipes" / "simclr_sd.yaml"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_only_a_leading_tilde_is_expanded(home):
    assert expand_home("~") == str(home)
    assert expand_home("~/a/~b") == f"{home}/a/~b"
    assert expand_home(Path("~/a")) == home / "a"
    assert expand_home("unix:~/a.sock") == f"unix:{home}/a.sock"
    assert expand_home(["~/a", {"b": Path("~/c")}, 3, None]) == [f"{home}/a", {"b": home / "c"}, 3, None]
    for same in (
        "a/~",
        "./~/a",
        "~nobody-of-this-name/a",
        "builtin:digits-flow",
        "",
        Path(),
        Path("a/~"),
        ("~x-y-z", 1),
    ):
        assert expand_home(same) == same


def test_every_path_of_a_recipe_is_expanded(home):
    overrides = ["dataset={name: folder, root: ~/photos, test_root: ~/test}", "generator.model=~/model"]
    overrides += ["generator.tiny_vae=~/vae", "generator.embedding_cache=~/kept", "variants.store=~/store"]
    overrides += ["variants.server=['unix:~/a.sock', 'host:1']", "variants.token_file=~/token", "variants.replay=~/log"]
    overrides += ["variants.tls={ca: ~/ca.pem, certificate: ~/c.pem, key: ~/k.pem}"]
    overrides += ["generator.interpolation={images: ~/bank, embeddings: ~/b.safetensors}"]
    text = load(Recipe, SD, overrides).model_dump_json()
    assert "~" not in text
    assert text.count(f"{home}/") == 14


def test_a_prompt_is_no_path(home):
    assert Flux2KleinConfig(prompt="~/ watercolour", model="FLUX").prompt == "~/ watercolour"


def test_every_path_of_a_server_file_is_expanded(home):
    overrides = ["address=unix:~/genssl.sock", "store={path: ~/store}", "tokens=[{name: a, file: ~/token}]"]
    overrides += ["tls={certificate: ~/c.pem, key: ~/k.pem, client_ca: ~/ca.pem}"]
    overrides += ["generators=[{name: flow, model: ~/flow, embedding_cache: ~/kept}]"]
    text = load(ServerFile, ROOT / "servers" / "digits_unclip.yaml", overrides).model_dump_json()
    assert "~" not in text
    assert text.count(f"{home}/") == 8


def test_paths_of_generator_recipes_and_of_options_are_expanded(home):
    recipe = load(GeneratorRecipe, ROOT / "recipes" / "generators" / "folder_flow.yaml",
                  ["dataset.root=~/photos", "conditioner={run: ~/run}"])  # fmt: skip
    assert "~" not in recipe.model_dump_json()
    (block,) = parse_blocks("dataset", ["{name: folder, root: ~/photos}"])
    assert isinstance(block, FolderConfig)
    assert block.root == home / "photos"


def test_the_folder_of_public_data_is_expanded(home, monkeypatch):
    monkeypatch.setenv("GENSSL_DATA", "~/sets")
    assert ImageNetConfig().root == home / "sets" / "imagenet"


def test_documents_files_and_stores_are_found_at_home(home):
    (home / "mine.yaml").write_text(SD.read_text())
    assert load(Recipe, "~/mine.yaml").name == "simclr-sd-digits"
    (home / "image.bin").write_bytes(b"an image")
    assert stored_image("~/image.bin").data == b"an image"
    (home / "token").write_text("secret\n")
    assert read_token_file(Path("~/token"), "token") == "secret"
    with VariantStore(Path("~/store")) as store:
        assert store.folder == home / "store"
    assert (home / "store" / "store.json").is_file()


def test_clients_find_sockets_and_certificates_at_home(home):
    assert VariantClient(["unix:~/a.sock", "host:1"]).targets == [f"unix:{home}/a.sock", "host:1"]
    assert ClientTLSConfig(ca="~/ca.pem").ca == home / "ca.pem"
    with pytest.raises(UserError, match=f"tls.ca: {home}/ca.pem cannot be read"):
        VariantClient("host:1", tls=ClientTLSConfig(ca="~/ca.pem")).generators()


def test_options_and_quoted_arguments_of_the_command_line_are_expanded(home):
    def genssl(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "genssl", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=home, check=False)

    (home / "mine.yaml").write_text(SD.read_text())
    assert genssl("validate", "~/mine.yaml").stdout == f"{home}/mine.yaml: valid\n"
    refused = genssl("preview", "~/mine.yaml", "--out=~/absent/picture.png")
    assert (refused.returncode, refused.stderr) == (
        2, f"genssl: --out {home}/absent/picture.png: the folder {home}/absent does not exist\n",
    )  # fmt: skip
    assert "~" not in {path.name for path in home.iterdir()}
