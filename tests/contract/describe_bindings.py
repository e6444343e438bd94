"""Prints what a TensorRT bindings module offers, as JSON. Run as a script, with the libraries' stand-ins preloaded."""

import json
import sys
from typing import Any


def describe(owner: Any, name: str) -> dict[str, Any]:
    value = getattr(owner, name)
    if isinstance(value, type):
        return {"kind": "class"}
    if isinstance(value, property):
        return {"kind": "property", "doc": value.fget.__doc__ or "", "settable": value.fset is not None}
    if callable(value):
        return {"kind": "function", "doc": value.__doc__ or ""}
    return {"kind": "value"}


def classes(owner: Any, prefix: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name in dir(owner):
        value = getattr(owner, name)
        if isinstance(value, type) and value.__module__.startswith("tensorrt_bindings"):
            members = {member: describe(value, member) for member in dir(value)}
            found[f"{prefix}{name}"] = members
            found.update(classes(value, f"{prefix}{name}."))
    return found


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import tensorrt_bindings as bindings

    module = {name: describe(bindings, name) for name in dir(bindings)}
    print(json.dumps({"": module, **classes(bindings, "")}))
