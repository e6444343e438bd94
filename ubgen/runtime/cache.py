"""Where files lie that only save time: they may be deleted whenever nothing runs."""

import os
from pathlib import Path


def cache_directory(*parts: str) -> Path:
    """`$XDG_CACHE_HOME/ubgen/<parts>` (default ~/.cache/ubgen/<parts>), made if it is missing."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root, "ubgen", *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
