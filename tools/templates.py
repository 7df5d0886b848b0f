"""Fill the Jinja templates of this folder."""

from pathlib import Path

import jinja2

from engine.files import write_text


def render(path, template, /, **values):
    """Write `path`: a template of this folder filled with `values`, escaped in HTML; UserError."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    escape, strict = jinja2.select_autoescape(["html.jinja"]), jinja2.StrictUndefined
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=loader, autoescape=escape, undefined=strict, **blocks)
    write_text(path, environment.get_template(template).render(values))
