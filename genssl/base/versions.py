"""Which versions of the packages that decide results are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "numpy", "scikit-learn", "grpcio", "protobuf")


def package_versions() -> dict[str, str]:
    """Returns the versions by package, "absent" for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
