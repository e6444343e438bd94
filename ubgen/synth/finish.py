"""What lies beside the shards of a finished dataset: figures, ledger, pictures, cards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubgen.core.stage import read_manifest
from ubgen.dataset import Store, open_dataset
from ubgen.dataset.card import CardFacts, write_card
from ubgen.dataset.croissant import write_croissant
from ubgen.dataset.tools.pictures import write_pictures
from ubgen.dataset.tools.stats import dataset_stats
from ubgen.synth.config import SynthConfig
from ubgen.synth.plan import LEDGER, Plan, exhausted_files


def describe(
    store: Store, config: SynthConfig, plan: Plan, engine_key: str, throughput: Sequence[tuple[float, int]]
) -> dict[str, Any]:
    """Write all of it; returns `dataset_stats`."""
    dataset = open_dataset(store, partial=True)
    stats = dataset_stats(dataset)
    with store.new_file(LEDGER) as file:
        for shard in dataset.shards:
            for line in shard.rejected():
                file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
    for name in exhausted_files(store.names()):  # of images that could be made after all
        store.delete(name)
    write_pictures(dataset, store, throughput, stats)
    facts = CardFacts(
        title=f"{Path(config.classes).stem}, synthetic ({config.per_class} per class)",
        images=plan.images,
        classes=len(plan.classes),
        shards=plan.shards,
        extension=plan.format,
        per_class=config.per_class,
        sampler=f"PNDM, {config.steps} steps, guidance {config.guidance}",
        seed=config.seed,
        prompt=_prompt(config),
        engine_key=engine_key,
        licence=config.licence,
        stats=stats,
        **origin(config),
    )
    write_card(store, facts)
    write_croissant(store, facts)
    return stats


def _prompt(config: SynthConfig) -> str:
    text = "the class name" if config.prompt == "{name}" else f'"{config.prompt}"'
    return f"{text}; some classes have their own, see classes.json" if config.prompts else text


def origin(config: SynthConfig) -> dict[str, str]:
    """Base model, as --base-model or the engine's manifest names it, and LoRA."""
    inputs = read_manifest(config.engine, "export").get("inputs", {})
    model, lora = inputs.get("stable_diffusion", {}), inputs.get("lora", {})
    return {
        "base_model": config.base_model or Path(model.get("path", "")).name,
        "lora_hash": lora.get("hash", ""),
    }
