"""The extras that messages and documents tell the user to install are those of pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    files = [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("engines/*.toml"),
        *ROOT.glob("ubgen/**/*.py"),
    ]
    named = {
        extra.strip(): path.relative_to(ROOT)
        for path in files
        for group in re.findall(r"(?:ubgen|'\.)\[([\w, -]+)\]", path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    called = re.findall(r'install_extra\("([\w-]+)"\)', "".join(p.read_text(encoding="utf-8") for p in files))
    assert set(called) <= set(extras)
    assert {"tensorrt", "float8", "torch-tensorrt"} <= set(named)
    assert {extra: path for extra, path in named.items() if extra not in extras} == {}
