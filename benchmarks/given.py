"""The key=value words of a benchmark's command line."""

from __future__ import annotations

import sys
from typing import Any


def given(defaults: dict[str, Any], needed: str = "", usage: str = "") -> dict[str, Any]:
    """The defaults with what the command line says. An unknown key, or none for `needed`, ends it in
    a line."""
    found = dict(defaults)
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key not in defaults or not value:
            sys.exit(f"no key {key!r}; the keys are {', '.join(defaults)}")
        found[key] = type(defaults[key])(value)
    if needed and not found[needed]:
        sys.exit(usage.split("\n\n")[1].strip())
    return found
