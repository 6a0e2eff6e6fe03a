"""For the documentation: brackets in docstrings are shapes and expectations, ``E[x] [in, in]``, and never links."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)


class DocstringShapes(griffe.Extension):
    """Escapes every bracket of a docstring that is not in code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            parts = CODE.split(obj.docstring.value)
            parts[::2] = [part.replace("[", "\\[") for part in parts[::2]]
            obj.docstring.value = "".join(parts)
