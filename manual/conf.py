# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes the site."""

from __future__ import annotations

from typing import Any

from chainmerge.__about__ import __version__

project = "chainmerge"
version = release = __version__
html_title = f"chainmerge {__version__}"
html_theme = "furo"
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
highlight_language = "none"
# Sphinx itself writes two hyphens for a dash. Quotes are meant as they are.
smartquotes_action = "D"

# Anchors of headings as GitHub makes them: the pages are read there, too.
myst_heading_anchors = 6

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 80
# Fields are described in the docstring of their class.
napoleon_use_ivar = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def setup(app: Any) -> None:
    """Called by Sphinx, with the application."""
    app.connect("autodoc-process-signature", _with_dots_for_factories)


def _with_dots_for_factories(
    _app: Any,
    _what: str,
    _name: str,
    _found: Any,
    _options: Any,
    signature: str | None,
    result: str,
) -> tuple[str | None, str]:
    """A default that is made anew each time is printed as what Python cannot read."""
    return signature and signature.replace("<factory>", "..."), result
