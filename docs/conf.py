"""Builds the pages of this folder: `python -m sphinx -W --keep-going -b html docs OUT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pages are the same on machines with a GPU

import genssl  # noqa: E402

project = "genssl"
author = "the genssl authors"
project_copyright = "the genssl authors; Apache-2.0"
version = release = genssl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "genssl_pages"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False
smartquotes = False  # `--out` must stay what is typed
default_role = "code"  # docstrings write `code` as Markdown does
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list of fields, since they are documented once, in the class

html_theme = "furo"
html_title = f"genssl {version}"
html_static_path = ["_static"]
html_css_files = ["genssl.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": False}
