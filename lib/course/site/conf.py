"""How Sphinx sets the site."""

import re

project = "Where the Memory Goes"
html_title = project
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

nb_execution_mode = "off"
nb_render_markdown_format = "gfm"
nb_merge_streams = True
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}

autodoc_member_order = "bysource"
autodoc_mock_imports = ["distributed"]  # an extra, and nothing that the reference shows
autodoc_inherit_docstrings = False  # those of torch are in its own documentation
autodoc_preserve_defaults = True
default_role = "literal"  # one backtick, as in Markdown


def as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: code is indented, or stands in backticks; all else is
    what it looks like."""
    text = "\n".join(lines)
    # Whatever is not code: no markup.
    parts = re.split(r"(`[^`]+`|^ {4}.*$)", text, flags=re.M)
    parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", part) for part in parts[::2]]
    # A block of code: what is indented behind an empty line.
    lines[:] = re.sub(r"\n\n(?= {4})", "\n\n::\n\n", "".join(parts)).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
