"""Prints what Torch-TensorRT makes of all networks of an engine, as JSON: its own lowering and choice of converters.

Run as a script, with TensorRT's bindings and the stand-ins of its libraries: only the interpreter, which would call
TensorRT, is replaced. Arguments: directory of the package, module that writes a small family of networks, spec.
"""

import importlib.util
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tensorrt_bindings
import torch


def import_package(wheel: Path, scratch: Path) -> None:
    """Without its own libraries, as where they are not built; it asks torch and the linker about this machine."""
    libraries = shutil.ignore_patterns("*.so", "lib", "bin", "include")
    shutil.copytree(wheel / "torch_tensorrt", scratch / "torch_tensorrt", ignore=libraries)
    sys.path.insert(0, str(scratch))
    sys.modules |= {"tensorrt": tensorrt_bindings, "dllist": SimpleNamespace(dllist=list)}
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.current_device = lambda: 0
    importlib.import_module("torch_tensorrt")


def networks(writer: Path, spec_name: str, scratch: Path) -> dict[str, Any]:
    from ubgen.diffusion import load_stable_diffusion
    from ubgen.export import load_spec
    from ubgen.export.inputs import real_inputs
    from ubgen.export.networks import clip_networks, qalign_networks, stable_diffusion_networks
    from ubgen.rewards import Clip, QAlign

    found = importlib.util.spec_from_file_location("writer", writer)
    family = importlib.util.module_from_spec(found)
    found.loader.exec_module(family)
    torch.manual_seed(0)
    family.write_stable_diffusion(scratch / "sd")
    family.write_clip(scratch / "clip")
    family.write_qalign(scratch / "qalign")
    spec = load_spec(spec_name)
    sd = load_stable_diffusion(scratch / "sd")
    real = real_inputs(sd, replace(spec, parity=replace(spec.parity, images=2, steps=2)))
    clip = Clip.load(scratch / "clip")
    return {
        **stable_diffusion_networks(sd, real.input_ids, real.unet_calls, real.latents),
        **clip_networks(clip, real.pixels, clip.tokenizer(real.names)),
        **qalign_networks(QAlign.load(scratch / "qalign"), real.pixels),
    }


class Interpreter:
    """In the place of `TRTInterpreter`: notes which converter each node of the lowered graph would get."""

    seen: dict[str, Any]

    def __init__(
        self, module: Any, inputs: Any, output_dtypes: Any, compilation_settings: Any, **_: Any
    ) -> None:
        from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS

        DYNAMO_CONVERTERS.set_compilation_settings(compilation_settings)
        missing, bytes_read_by = [], []
        for node in module.graph.nodes:
            if not node.op.startswith("call_"):
                continue
            converter = DYNAMO_CONVERTERS.get(node)
            if converter is None:
                missing.append(f"{node.target} {dict(node.kwargs)}")
            elif any(a.meta["val"].dtype == torch.uint8 for a in node.args if is_tensor(a)):
                bytes_read_by.append(converter[0].__name__)
        types = [str(given.dtype) for given in inputs], [str(dtype) for dtype in output_dtypes]
        Interpreter.seen = {"missing": missing, "bytes read by": sorted(bytes_read_by), "types": types}

    def run(self) -> Any:
        from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreterResult

        return TRTInterpreterResult(SimpleNamespace(serialize=lambda: b"plan"), [], [], False, False)


def is_tensor(argument: Any) -> bool:
    return isinstance(argument, torch.fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def main(wheel: str, writer: str, spec_name: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        import_package(Path(wheel), scratch)
        from torch_tensorrt.dynamo.conversion import _conversion

        from ubgen.export.compilers.torch_tensorrt import compile_network
        from ubgen.export.mixed_precision import lower
        from ubgen.export.spec import BatchRange, NetworkSpec

        _conversion.TRTInterpreter = Interpreter
        spec = NetworkSpec(BatchRange(1, 2, 4), 1e-2, "torch_tensorrt", "float16")
        for network, exportable in networks(Path(writer), spec_name, scratch).items():
            half = replace(exportable, module=lower(exportable.module, "float16"))
            compiled = compile_network(half, spec, scratch / f"{network}.plan", "cuda:0", print)
            assert compiled[0].read_bytes() == b"plan"
            print(json.dumps({"network": network, **Interpreter.seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
