# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes the site."""

from __future__ import annotations

from typing import Any

from docutils import nodes

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
# An option begins with two hyphens, which are not a dash.
smartquotes = False

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
    app.connect("doctree-read", _put_dashes_between_fields_and_texts)


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


def _put_dashes_between_fields_and_texts(_app: Any, doctree: nodes.document) -> None:
    """Sphinx puts two hyphens there, and counts on their being made a dash."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))
