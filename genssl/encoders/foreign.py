"""Checkpoints that other tools wrote with `torch.save`, read without running what is in them."""

from __future__ import annotations

import argparse
import pickle
import re
import shlex
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from genssl.base.saved_state import DamagedError, check_digest
from genssl.errors import UserError

Tensors = dict[str, torch.Tensor]
NAMES = ("arch", "architecture", "model_name", "model")  # under which tools keep a network's name, as text
CHANGES = ("act_layer", "aa_layer", "output_stride")  # of timm's `--model-kwargs`: another network of the same tensors

# Takes what a checkpoint holds of tensors; for people who trust a file that `read_checkpoint` does not.
EXTRACT = """import torch
c = torch.load({given!r}, map_location='cpu', weights_only=False)
tensors = lambda v: v.state_dict() if isinstance(v, torch.nn.Module) else \
{{k: tensors(x) for k, x in v.items()}} if isinstance(v, dict) else v if isinstance(v, torch.Tensor) else 0
torch.save(tensors(c), {wanted!r})"""


class EncoderError(UserError):
    """An encoder that is absent, cannot be read, or does not fit its network."""


def read_checkpoint(path: Path) -> tuple[Tensors, str | None]:
    """Returns all tensors of a file that `torch.save` wrote, named by their key paths, and what it calls its network.

    Runs no code of the file. The network's name is None where the file has none, and otherwise text such as
    "resnetblur18" or "resnet18, output_stride=16".

    Beside tensors and plain data it may hold `argparse.Namespace`, in which timm, DINO, MAE and others keep settings.

    Raises:
        EncoderError: if it is no such file, or holds other Python objects.
    """
    try:
        with warnings.catch_warnings():  # about protocols of pickle, beside the error that follows
            warnings.simplefilter("ignore", UserWarning)
            check_digest(path)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError as error:
        raise EncoderError(f"{path}: is damaged ({error}); get it again, or take another checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            wanted = path.with_name(f"{path.name.split('.')[0]}-tensors.pth")
            command = shlex.quote(EXTRACT.format(given=str(path), wanted=str(wanted)).replace("\n", "; "))
            raise EncoderError(
                f"{path}: holds a Python object ({named[1].rstrip('.')}), which could run code when it is loaded, so "
                "the file is not opened; ask its author for the state dict alone, or, if you trust it and have the "
                f"packages that it was written with, take the tensors out into {wanted}: python -c {command}"
            ) from None
        raise EncoderError(
            f"{path}: is damaged, or no file that torch.save wrote ({type(error).__name__}); get it again"
        ) from None
    tensors: Tensors = {}
    _collect(content, (), tensors)
    if not tensors:
        raise EncoderError(f"{path}: holds no tensors; give the checkpoint of an encoder")
    return tensors, _says_itself(content)


def _says_itself(content: Any) -> str | None:
    top = content if isinstance(content, dict) else {}
    held = top.get("args")
    arguments = vars(held) if isinstance(held, argparse.Namespace) else held if isinstance(held, dict) else {}
    found = (place.get(key) for place in (top, arguments) for key in NAMES)
    name = next((one for one in found if isinstance(one, str) and re.fullmatch(r"[\w./-]{1,80}", one)), None)
    held = arguments.get("model_kwargs")
    settings = {key: str(held[key]) for key in CHANGES if held.get(key)} if isinstance(held, dict) else {}
    changed = [f"{key}={value}" for key, value in settings.items() if re.fullmatch(r"[\w.]{1,80}", value)]
    return ", ".join([name or "a network", *changed]) if name or changed else None


def _collect(value: Any, path: tuple[str, ...], into: Tensors) -> None:
    if isinstance(value, torch.Tensor):
        into[".".join(path)] = value.detach()
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, (*path, str(key)), into)
