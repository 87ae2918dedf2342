"""The README's commands exist, and their recipes validate with the overrides they show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from genssl.config.document import apply_override, read_document
from genssl.config.kinds import model_of
from genssl.config.load import validate

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
HEADERS = [path.read_text() for folder in ("recipes", "servers") for path in (ROOT / folder).rglob("*.yaml")]


def commands() -> list[list[str]]:
    """Returns every `genssl ...` command of the README's code blocks and of the headers of shipped YAML files."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    headers = [
        line.removeprefix("#") for text in HEADERS for line in text.splitlines() if line.startswith("#   genssl")
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + headers
    found = []
    for line in lines:
        for part in re.split(r"&&|;", line.split(" # ")[0]):
            words = shlex.split(
                part.replace("$seed", "0").replace("$source", "none").removeprefix(" do"), comments=True
            )
            if "genssl" in words:
                found.append(words[words.index("genssl") + 1 :])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_shown_command_validates(words):
    command, *arguments = words
    assert command in {"run", "runs", "serve-generator", "train-generator", "preview", "show", "validate", "list"}
    files = [argument for argument in arguments if argument.endswith(".yaml")]
    if not files:
        return
    document = read_document(ROOT / files[0])
    for argument in arguments:
        if re.match(r"[\w.]+=", argument):
            apply_override(document, argument)
    validate(model_of(document), document)


def test_the_readme_shows_the_two_commands():
    assert any(words == ["run", "recipes/simclr_sd.yaml"] for words in commands())
    assert 'pip install -e ".[test]" && pytest' in README


def test_the_readme_shows_files_that_exist():
    for path in re.findall(r"\]\((recipes/[^)]+)\)", README):
        assert (ROOT / path).is_file()
