"""Sphinx settings of the Python reference, which is made of the docstrings. In `make docs` a warning is an error."""

import re
from importlib.metadata import version as _version

project = "zpipe"
author = "zpipe developers"
version = release = _version("zpipe")
extensions = ["sphinx.ext.autodoc"]
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
html_theme = "alabaster"
html_theme_options = {"nosidebar": True, "body_max_width": "60em"}
html_show_sourcelink = False


def _to_restructured_text(app, what, name, obj, options, lines):
    """Adapt our docstrings to reStructuredText.

    It wants an empty line around an indented block, and an escape before the s of a plural such as `Result`s.
    """
    lines[:] = [re.sub(r"`s\b", r"`\\ s", line) for line in lines]
    for number in range(len(lines) - 1, 0, -1):
        above, here = lines[number - 1], lines[number]
        if above.strip() and here.strip() and _indent(above) != _indent(here):
            lines.insert(number, "")


def _indent(line):
    return len(line) - len(line.lstrip())


def setup(app):
    app.connect("autodoc-process-docstring", _to_restructured_text)
