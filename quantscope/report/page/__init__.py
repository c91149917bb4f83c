"""Results as one HTML file that opens anywhere: the charts' library, the style and all data are inside it."""

from __future__ import annotations

from quantscope.report.page.content import Page
from quantscope.report.page.render import html

__all__ = ["Page", "html"]
