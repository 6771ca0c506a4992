"""The status page: three files without a build step, served by the control API.

They hold no data: the program asks the API for it, with a token that the viewer gives. Nothing is
loaded from anywhere else, and nothing inline runs.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from imagecache.explain.page import FIGURE_STYLE

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def asset(name: str) -> str:
    """One file of the page; the style has that of a start's figures in it."""
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return text + FIGURE_STYLE if name == "page.css" else text
