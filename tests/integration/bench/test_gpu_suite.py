"""The GPU suite: its reduced run on a CPU, what isolates its parts, and the UNet that it tunes."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_suite.report import markdown
from bench.gpu_suite.sizes import TINY
from bench.gpu_suite.tuned import PhaseUpsample, TunedUNet, Tuning, native_norms, phase_upsamplers

ROOT = Path(__file__).resolve().parents[3]
PARTS = ["build", "tests", "ceilings", "kernels", "denoise", "decode", "score", "train"]
DEEPER = {
    **TINY.unet,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
}


def test_the_reduced_run_goes_through_every_part(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    run = subprocess.run(
        [ROOT / "bench" / "gpu_suite.sh", tmp_path, "--cpu"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    log = tmp_path / "suite.log"
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    parts = results["parts"]
    assert list(parts) == PARTS
    assert {name: part.get("error") for name, part in parts.items()} == dict.fromkeys(PARTS), log.read_text()
    skipped = {entry["what"]: entry["reason"] for part in parts.values() for entry in part["skipped"]}
    expected = {"build", "native operations", "xformers, checkpointing on", "xformers, checkpointing off"}
    assert set(skipped) <= expected, skipped
    calls = {(r["variant"], r["batch"]) for r in parts["denoise"]["rows"] if r["kind"] == "call"}
    both = {"eager", "channels-last", "graph", "graph-native", "onnxruntime"}
    assert calls == {(name, batch) for name in both for batch in (1, 2)} | {("compile", 2), ("tuned", 2)}
    loops = {r["variant"] for r in parts["denoise"]["rows"] if r["kind"] == "loop"}
    assert {"eager", "compile"} < loops
    assert {r["network"] for r in parts["score"]["rows"]} == {"CLIP", "Q-Align"}
    trained = {r["variant"] for r in parts["train"]["rows"]}
    assert trained >= {"sdpa, checkpointing on", "sdpa, checkpointing off"}
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    for title in ("Native operations", "One guided UNet call, 2 images", "Decoder", "Scorers", "One update"):
        assert f"## {title}" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pytest.log",
        "results.json",
        "results.md",
        "suite.log",
    ]


FAULTY = """
import os, sys, tempfile, time
from pathlib import Path
from bench.gpu_suite import __main__ as driver
from bench.gpu_suite.__main__ import Part, play
from bench.gpu_suite.suite import Settings

def raises(suite):
    suite.add(value=1)
    raise ValueError("no such kernel")

def crashes(suite):
    suite.add(value=2)
    os.abort()

def hangs(suite):
    suite.add(value=3)
    time.sleep(600)

def never_ready(suite):
    time.sleep(600)

def works(suite):
    with suite.guard("a detail"):
        raise RuntimeError("out of memory")
    suite.add(value=4)

out, work = Path(sys.argv[1]), Path(tempfile.mkdtemp())
settings = Settings(out, work, "cpu", False, time.monotonic() + 120)
driver.COMPILED_BY = 0.04
parts = [Part("build", 5, raises), Part("a", 5, crashes), Part("b", 0.5, hangs), Part("c", 5, works, never_ready)]
play(settings, [*parts, Part("d", 5, works)])
"""


def test_a_part_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FAULTY, tmp_path], env=environment, check=True, capture_output=True)
    parts = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["parts"]
    assert {name: part.get("error") for name, part in parts.items()} == {
        "build": "ValueError: no such kernel",
        "a": "its process ended with exit code -6",
        "b": "its time was up; what it had measured by then is kept",
        "c": "it was not compiled in time",
        "d": None,
    }
    assert {name: part["rows"] for name, part in parts.items()} == {
        "build": [{"value": 1}],
        "a": [{"value": 2}],
        "b": [{"value": 3}],
        "c": [],
        "d": [{"value": 4}],
    }
    assert parts["d"]["skipped"] == [{"what": "a detail", "reason": "RuntimeError: out of memory"}]


def random_unet(config: dict):
    """With every weight away from its initial value, biases and norms too."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return unet


@torch.no_grad()
@pytest.mark.parametrize(
    "tuning", [Tuning(False, False), Tuning(True, False), Tuning(False, True), Tuning(native_norm=True)]
)
@pytest.mark.parametrize("config", [TINY.unet, DEEPER])
def test_the_tuned_unet_is_diffusers_unet(config, tuning):
    unet = random_unet(config)
    latents, timestep = torch.randn(3, 4, 8, 8), torch.tensor([981.0, 501.0, 3.0])
    cond, uncond = torch.randn(3, 6, 24), torch.randn(1, 6, 24)
    context = torch.cat([uncond.expand_as(cond), cond])
    e_uncond, e_cond = unet(torch.cat([latents] * 2), torch.cat([timestep] * 2), context).sample.chunk(2)
    wanted = e_uncond + 2 * (e_cond - e_uncond)
    for layout in (torch.contiguous_format, torch.channels_last):
        tuned = TunedUNet(copy.deepcopy(unet), tuning, guidance=2.0)
        tuned = tuned.to_precision(torch.float32).to(memory_format=layout)
        tuned.set_prompts(torch.randn(3, 6, 24), torch.randn(1, 6, 24))
        tuned.set_prompts(cond, uncond)
        assert (tuned(latents, timestep) - wanted).norm() / wanted.norm() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 4)])
def test_four_small_convolutions_enlarge(size):
    conv = torch.nn.Conv2d(5, 6, 3, padding=1)
    x = torch.randn(2, 5, *size)
    wanted = conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(PhaseUpsample(conv)(x), wanted)


@torch.no_grad()
def test_the_tuned_decoder_is_diffusers_decoder():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**TINY.vae).eval()
    latents = torch.randn(2, 4, 8, 8)
    wanted = vae.decode(latents).sample
    phase_upsamplers(vae.decoder)
    native_norms(vae.decoder)
    torch.testing.assert_close(vae.decode(latents).sample, wanted, rtol=1e-4, atol=1e-5)


def test_the_report_compares_with_the_peers_and_the_measured_rates():
    def call(variant: str, ms: float, executed: float) -> dict:
        fixed = {
            "kind": "call",
            "batch": 32,
            "about": "",
            "dtype": "bfloat16",
            "error": 0.001,
            "peak_gb": 1.0,
        }
        return {
            **fixed,
            "variant": variant,
            "ms": ms,
            "q1": ms,
            "q3": ms,
            "tflops": 400.0,
            "executed_tflops": executed,
        }

    calls = [call("eager", 300, 100.0), call("compile", 150, 200.0), call("tuned", 100, 390.0)]
    rate = {"name": "matmul", "dtype": "bfloat16", "side": 8192, "tflops": 780.0}
    parts = {
        "ceilings": {"rows": [rate], "skipped": [], "facts": {}},
        "denoise": {"rows": calls, "skipped": [{"what": "tensorrt", "reason": "not installed"}], "facts": {}},
    }
    text = markdown({"reduced": False, "seconds": 500.0, "parts": parts})
    assert "## Goal: batch 32, the fastest is tuned" in text
    assert "| share of the measured bfloat16 matrix rate | 60% | 50% |" in text
    assert "| against eager diffusers | 2.5x | 3.00x |" in text
    assert "| against torch.compile | 1.4x | 1.50x |" in text
    assert "- denoise, tensorrt: not installed" in text
