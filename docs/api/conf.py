"""Sphinx settings of the Python reference, which is made of the docstrings. In `make docs` a warning is an error."""

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


def _blocks_stand_alone(app, what, name, obj, options, lines):
    """Our docstrings indent what goes on about the line above; reStructuredText wants an empty line around that."""
    for number in range(len(lines) - 1, 0, -1):
        above, here = lines[number - 1], lines[number]
        if above.strip() and here.strip() and _indent(above) != _indent(here):
            lines.insert(number, "")


def _indent(line):
    return len(line) - len(line.lstrip())


def setup(app):
    app.connect("autodoc-process-docstring", _blocks_stand_alone)
