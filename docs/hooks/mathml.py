"""Formulas as MathML, which browsers draw themselves: no script, nothing fetched by the reader."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

#: As the Markdown extension marks formulas, and as docstrings write them.
BLOCK = re.compile(
    r'<div class="arithmatex">\\\[(.*?)\\\]</div>|<p>\.\. math::(.*?)</p>', flags=re.DOTALL
)
INLINE = re.compile(
    r'<span class="arithmatex">\\\((.*?)\\\)</span>|:math:<code>(.*?)</code>', flags=re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula by its MathML."""
    content = BLOCK.sub(lambda found: _mathml(found, "div", "block"), content)
    return INLINE.sub(lambda found: _mathml(found, "span", "inline"), content)


def _mathml(found: re.Match[str], tag: str, display: str) -> str:
    formula = html.unescape(found[1] or found[2]).strip()
    return f'<{tag} class="formula">{convert(formula, display=display)}</{tag}>'
