"""croissant.json: a Croissant 1.0 description, and samples.csv, the table that its records are joined from.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubgen import __version__
from ubgen.core.files import Store, open_store
from ubgen.dataset.card import CLASSES, SYNTHETIC, CardFacts
from ubgen.dataset.shards import ShardInfo, finished_shards
from ubgen.dataset.text import measure_rows, plain, score_titles

CROISSANT = "croissant.json"
SAMPLES = "samples.csv"
_TERMS = (
    "citeAs column equivalentProperty extract field fileProperty fileObject fileSet format includes isLiveDataset "
    "jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate separator source "
    "subField transform"
)
_MEDIA = {"jpg": "image/jpeg", "png": "image/png"}


def write_croissant(where: str | Path | Store, facts: CardFacts) -> None:
    """croissant.json and samples.csv (file, shard, class_index, scores and flag of every image), from the sidecars.

    mlcroissant loads it and yields records with image, label and scores from a local copy of the directory. It finds
    images through the tars, which it unpacks into its cache, and joins them with samples.csv by file name.
    """
    store = open_store(where)
    shards = list(finished_shards(store, range(facts.shards)).values())
    scores = list(facts.stats.get("scores", ()))
    digest = _write_samples(store, shards, scores, facts.extension)
    document = _document(store, facts, shards, scores, digest)
    store.write(CROISSANT, json.dumps(document, indent=1) + "\n")


def _write_samples(store: Store, shards: Sequence[ShardInfo], scores: Sequence[str], extension: str) -> str:
    """SHA-256 of the table."""
    digest = hashlib.sha256()
    with store.new_file(SAMPLES) as file:
        for rows in _tables(shards, scores, extension):
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\n").writerows(rows)
            digest.update(data := buffer.getvalue().encode())
            file.write(data)
    return digest.hexdigest()


def _tables(shards: Sequence[ShardInfo], scores: Sequence[str], extension: str) -> Any:
    yield [["file", "shard", "class_index", *scores, "flag"]]
    for shard in shards:
        yield [
            [f"{s.key}.{extension}", shard.index, s.class_index, *map(s.scores.get, scores), s.flag]
            for s in shard.read().samples
        ]


def _document(
    store: Store, facts: CardFacts, shards: Sequence[ShardInfo], scores: Sequence[str], samples_digest: str
) -> dict[str, Any]:
    classes_digest = hashlib.sha256(store.read(CLASSES)).hexdigest()
    return {
        "@context": _context(),
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": plain(facts.title),
        "description": f"{facts.images} images of {facts.classes} classes. {SYNTHETIC} {_provenance(facts)}",
        "license": plain(facts.licence) or "unknown",
        "url": "./",
        "version": "1.0.0",
        "citeAs": plain(facts.title),
        "creator": {"@type": "sc:Organization", "name": f"ubgen {__version__}"},
        "keywords": ["synthetic", "image classification", "WebDataset"],
        "distribution": _distribution(facts, shards, samples_digest, classes_digest),
        "recordSet": [_class_records(), _sample_records(scores)],
        **_responsible(facts),
    }


def _responsible(facts: CardFacts) -> dict[str, Any]:
    """What the RAI extension asks for, as far as the run knows it.

    https://docs.mlcommons.org/croissant/docs/croissant-rai-spec.html
    """
    rejected = facts.stats.get("rejected", {})
    reasons = ", ".join(f"{plain(reason)}: {count}" for reason, count in rejected.items()) or "none"
    model = plain(facts.base_model) or "a base model that is not stated"
    fields = {
        "dataCollection": f"{SYNTHETIC} {_provenance(facts)}",
        "dataCollectionType": ["Software Collection"],
        "dataCollectionMissingData": f"Images drawn again, by reason: {reasons}. Kept although they were not "
        f"acceptable, with a flag: {facts.stats.get('flagged', 0)}.",
        "dataPreprocessingProtocol": [
            f"Images were decoded by the model, quantised to 8 bits and stored as {facts.extension.upper()}; an image "
            "that a threshold rejected, of one colour, or not finite was drawn again."
        ],
        "dataAnnotationProtocol": [
            "The label is the class whose prompt the image was generated from. No person looked at the images."
        ],
        "annotationsPerItem": "1",
        "machineAnnotationTools": [f"{model}, by ubgen {__version__}", *_scorers(facts)],
        "dataBiases": [
            f"The images inherit the biases of {model}, of its training data, and of the networks that scored them.",
            "A name with several meanings may be shown in one of them only.",
            *_measured(facts),
        ],
        "dataLimitations": [
            "Labels were not verified; an image may not show its class. Models trained on the images are to be "
            "evaluated on real ones."
        ],
        "dataUseCases": ["Pre-training and evaluation of image classifiers."],
        "dataSocialImpact": "No image is of a real person, but a generator can resemble images of its training data, "
        "and can repeat stereotypes of people, places and occupations; check classes that show people before use.",
        "personalSensitiveInformation": [
            "None was collected; whether the base model's training data held any is "
            "for its own documentation to say."
        ],
    }
    return {f"rai:{name}": value for name, value in fields.items()}


def _scorers(facts: CardFacts) -> list[str]:
    return [f"score: {score_titles(name)[1]}" for name in facts.stats.get("scores", ())]


def _measured(facts: CardFacts) -> list[str]:
    if not facts.measures:
        return []
    figures = "; ".join(f"{name}: {text}" for name, text in measure_rows(facts.measures).items())
    return [
        f"Measured on features by {plain(facts.measures['encoder'])}, 95 % intervals in brackets: {figures}."
    ]


def _context() -> dict[str, Any]:
    terms: dict[str, Any] = {term: f"cr:{term}" for term in _TERMS.split()}
    return {
        "@language": "en",
        "@vocab": "https://schema.org/",
        "cr": "http://mlcommons.org/croissant/",
        "dct": "http://purl.org/dc/terms/",
        "rai": "http://mlcommons.org/croissant/RAI/",
        "sc": "https://schema.org/",
        "conformsTo": "dct:conformsTo",
        "data": {"@id": "cr:data", "@type": "@json"},
        "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
        "examples": {"@id": "cr:examples", "@type": "@json"},
        **terms,
    }


def _provenance(facts: CardFacts) -> str:
    parts = {
        "Base model": facts.base_model or "not stated",
        "LoRA": facts.lora_hash or "none",
        "engine": facts.engine_key,
        "sampler": facts.sampler,
        "seed": facts.seed,
        "prompt": facts.prompt,
    }
    return "; ".join(f"{name}: {plain(value)}" for name, value in parts.items()) + "."


def _distribution(
    facts: CardFacts, shards: Sequence[ShardInfo], samples_digest: str, classes_digest: str
) -> list[dict[str, Any]]:
    tars = [_file(s.tar, "application/x-tar", s.sha256, contentSize=f"{s.bytes} B") for s in shards]
    images = {
        "@type": "cr:FileSet",
        "@id": "images",
        "name": "images",
        "containedIn": [{"@id": tar["@id"]} for tar in tars],
        "encodingFormat": _MEDIA[facts.extension],
        "includes": f"*.{facts.extension}",
    }
    tables = [
        _file(SAMPLES, "text/csv", samples_digest),
        _file(CLASSES, "application/json", classes_digest),
    ]
    return [*tars, images, *tables]


def _file(name: str, media: str, sha256: str, **more: str) -> dict[str, Any]:
    about = {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name, "encodingFormat": media}
    return {**about, "sha256": sha256, **more}


def _class_records() -> dict[str, Any]:
    types = {"index": "sc:Integer", "id": "sc:Text", "name": "sc:Text", "prompt": "sc:Text"}
    fields = [
        _field(
            f"classes/{key}", kind, {"fileObject": {"@id": CLASSES}, "extract": {"jsonPath": f"$[*].{key}"}}
        )
        for key, kind in types.items()
    ]
    return {"@type": "cr:RecordSet", "@id": "classes", "key": {"@id": "classes/index"}, "field": fields}


def _sample_records(scores: Sequence[str]) -> dict[str, Any]:
    def images(file_property: str) -> dict[str, Any]:
        return {"fileSet": {"@id": "images"}, "extract": {"fileProperty": file_property}}

    def table(column: str) -> dict[str, Any]:
        return {"fileObject": {"@id": SAMPLES}, "extract": {"column": column}}

    fields = [
        {**_field("samples/file", "sc:Text", images("filename")), "references": table("file")},
        _field("samples/image", "sc:ImageObject", images("content")),
        _field("samples/label", "sc:Integer", table("class_index")),
        *(_field(f"samples/{name}", "sc:Float", table(name)) for name in scores),
    ]
    return {"@type": "cr:RecordSet", "@id": "samples", "key": {"@id": "samples/file"}, "field": fields}


def _field(name: str, data_type: str, source: dict[str, Any]) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": name, "name": name, "dataType": data_type, "source": source}
