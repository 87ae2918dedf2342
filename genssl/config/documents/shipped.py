"""The recipes and server files that are part of the installed package."""

from __future__ import annotations

import re
from pathlib import Path

import genssl
from genssl.errors import UserError

IN_PACKAGE = "recipes_data"  # where the wheel has them; in a source tree they stand beside the package
SERVERS = "servers"
SERVERS_IN_PACKAGE = "servers_data"


def recipes_folder() -> Path:
    """Returns the folder of the recipes of this version.

    Raises:
        UserError: if there is none, as after copying the package without its data.
    """
    package = Path(genssl.__file__).resolve().parent
    for folder in (package / IN_PACKAGE, package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError(f"recipes: this installation has none (looked for {package / IN_PACKAGE}); install genssl again")


def shipped_recipes() -> dict[str, Path]:
    """Returns the files by name: the path below the folder, without suffix; those of the top folder first."""
    folder = recipes_folder()
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return {name: names[name] for name in sorted(names, key=lambda name: (name.count("/"), name))}


def shipped_servers() -> dict[str, Path]:
    """Returns the server files by name, such as servers/digits_unclip; none where the package is without its data."""
    package = Path(genssl.__file__).resolve().parent
    folders = (package / SERVERS_IN_PACKAGE, package.parent / SERVERS)
    folder = next(filter(Path.is_dir, folders), folders[0])
    return {f"{SERVERS}/{path.stem}": path for path in sorted(folder.glob("*.yaml"))}


def shipped_or_own(path: Path) -> Path:
    """Returns a file of one's own, or, where there is none, the shipped one that `path` is the name of."""
    if path.is_file() or path.is_absolute():
        return path
    name = path.as_posix().removesuffix(".yaml")
    return shipped_servers().get(name) or shipped_recipes().get(name, path)


def completions(incomplete: str) -> list[str]:
    """Returns the shipped names, and the YAML files of one's own, that what was typed may become."""
    own = [str(path) for pattern in ("*.y*ml", "*/*.y*ml") for path in Path().glob(f"{incomplete}{pattern}")]
    return [name for name in shipped_recipes() if name.startswith(incomplete)] + sorted(own)


def headline(path: Path) -> str:
    """Returns the first sentence of the comment that opens a file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.lstrip("# "))
    return re.split(r"(?<=\.) (?=[A-Z0-9])(?<!al\. )", " ".join(lines), maxsplit=1)[0]
