"""What an engine is timed on: real prompts, noise by identity, and what its own networks make of them."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ubgen.core.classes import load_classes
from ubgen.diffusion import initial_noise
from ubgen.runtime import EngineSet
from ubgen.runtime.pipeline import Pipeline

CLASSES = "imagenet100"  # the names are prompts here, nothing more
_SHORT = 4  # sampling steps of the latents that the decoder is timed on


class Workload:
    """`inputs` of every network, the denoising loop and the whole pipeline.

    `batch` rows of each network, clipped to what it takes; None is what it was made for.
    """

    def __init__(self, engines: EngineSet, batch: int | None, steps: int, guidance: float) -> None:
        self.engines, self.steps, self.guidance = engines, steps, guidance
        self.rows = {name: self._rows(name, batch) for name in engines}
        self.images = self.rows["unet"]
        self.pipeline = Pipeline(engines, engines.path, steps=steps, guidance=guidance)
        names = self._names(self.images)
        self.cond, self._photos = self.pipeline.encode_prompts(names), self.pipeline.encode_photos(names)
        self.inputs = self._inputs()

    def noise(self) -> Tensor:
        """(images,C,h,w)"""
        classes, shape = len(load_classes(CLASSES)), self.pipeline.latent_shape
        rows = [initial_noise(0, i % classes, i // classes, shape) for i in range(self.images)]
        return torch.stack(rows).to(self.engines.device)

    def denoise(self, noise: Tensor) -> Tensor:
        return self.pipeline.denoise(noise, self.cond)

    def scored_images(self) -> np.ndarray:
        """From identities to pixels (B,H,W,3) uint8 and scores, all on the host."""
        pixels = self.pipeline.decode(self.denoise(self.noise()))
        for scores in self.pipeline.score(pixels, self._photos):
            scores.tolist()
        return pixels.cpu().numpy()

    def _rows(self, name: str, batch: int | None) -> int:
        takes = self.engines[name].signature.batch
        return takes.best if batch is None else max(takes.min, min(batch, takes.max))

    def _names(self, count: int) -> list[str]:
        names = load_classes(CLASSES).names
        return [names[i % len(names)] for i in range(count)]

    def _inputs(self) -> dict[str, dict[str, Tensor]]:
        run, device, noise = self.pipeline, self.engines.device, self.noise()
        latents = run.denoise(noise, self.cond, _SHORT)
        pixels = run.decode(latents)
        unet = {"latents": noise, "timestep": torch.full((self.images,), 501.0, device=device)}
        return {
            "text_encoder": {"input_ids": run.tokenize(self._names(self.rows["text_encoder"])).to(device)},
            "unet": {**unet, "cond": self.cond, "uncond": run.uncond, "guidance": run.guidance},
            "vae_decoder": self._repeated("vae_decoder", {"latents": latents}),
            "clip_image": self._repeated("clip_image", {"pixels": pixels}),
            "clip_text": {"tokens": run.tokenize_photos(self._names(self.rows["clip_text"])).to(device)},
            "qalign": self._repeated("qalign", {"pixels": pixels}),
        }

    def _repeated(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As many rows as `name` is timed on, beginning again where there are fewer."""
        return {
            key: tensor[torch.arange(self.rows[name], device=tensor.device) % len(tensor)]
            for key, tensor in inputs.items()
        }
