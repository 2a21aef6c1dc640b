"""Settings of the documentation: `make docs` builds it with Sphinx into build/docs."""

import sys
import urllib.request
from http.client import HTTPException
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]


def reachable(url: str) -> bool:
    """Return whether an inventory of another project's names can be read now."""
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=5) as inventory:
            found = inventory.readline().startswith(b"# Sphinx inventory")  # a proxy may answer with a page of its own
    except (OSError, HTTPException):
        found = False
    if not found:
        print(f"no links to {url}: it cannot be reached")
    return found


project = "ZClip"
author = "the ZClip developers"
copyright = "the ZClip developers, MIT licence"
release = version = installed_version("zclip")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "mathml",
]
exclude_patterns = ["_*"]
nitpicky = True
default_role = "code"  # a single backtick in a docstring

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give the types that matter, with shapes and units
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

PROJECTS = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
}
intersphinx_mapping = {name: (url, None) for name, url in PROJECTS.items() if reachable(url)}
# Names of other projects are links where their inventories can be reached, and plain text elsewhere.
nitpick_ignore_regex = [(r"py:.*", r"(torch|lightning|transformers|collections|typing|numpy|deepspeed)\..*")]

html_theme = "furo"
html_title = "ZClip"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["zclip.css"]
html_copy_source = False
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"
