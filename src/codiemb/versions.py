"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "codiemb",
    "torch",
    "transformers",
    "sentence-transformers",
    "peft",
    "datasets",
    "numpy",
    "scipy",
    "scikit-learn",
    "pytrec-eval-terrier",
)


def versions() -> dict[str, str]:
    """Versions by package, and of Python; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
