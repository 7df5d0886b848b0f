"""Fill the Jinja templates of this folder."""

from pathlib import Path

import jinja2

from engine.files import write_text


def render(path, template, /, **values):
    """Write `path`: a template file of this folder, filled with `values`, HTML escaped.

    Raises UserError where `path` cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    write_text(path, environment.get_template(template).render(values))
