"""What a run needs, looked at before its directory is touched: a mistake must cost nothing that is there already."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubgen.core.errors import UserError
from ubgen.runtime import Signature
from ubgen.runtime.engine import check_engine
from ubgen.runtime.pipeline import NETWORKS
from ubgen.synth.config import SynthConfig
from ubgen.synth.executors.job import devices
from ubgen.synth.generator import images_at_a_time


def own_device(manifest: Mapping[str, Any]) -> str:
    """The device that an engine was made for; "cpu" where its manifest does not say, as that of stand-ins."""
    return str(manifest.get("config", {}).get("spec", {}).get("device", "cpu"))


def check_fits(config: SynthConfig, manifest: Mapping[str, Any]) -> None:
    """UserError when the engine of `config` cannot do what is asked of it on the devices that are to run it."""
    try:
        _check_networks(config, manifest["engine"]["networks"])
        if config.executor != "ray":  # there compilers and devices are those of the nodes, which look at them
            _check_machine(config, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{config.engine}: its manifest is not that of an engine ({error}); export it again"
        ) from error


def _check_networks(config: SynthConfig, networks: Mapping[str, Any]) -> None:
    for name in NETWORKS:
        if name not in networks:
            raise UserError(f"{config.engine} has no network {name!r}; export it again")
    images_at_a_time(config, Signature.from_dict(networks["unet"]["signature"]).batch)


def _check_machine(config: SynthConfig, manifest: Mapping[str, Any]) -> None:
    engine, spec = manifest["engine"], manifest["config"]["spec"]
    if not config.overwrite:
        # workers look at every byte of the files when they open them; before something is deleted, we do too
        engine = {**engine, "networks": {}, "extras": {}}
    check_engine(Path(config.engine), engine, spec, devices(config)[0])
