"""The prompt of every class, and what the tokenizer makes of it: prompts that are equal, or cut."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ubgen.core.classes import ClassList, shipped_lists
from ubgen.core.errors import UserError, warn
from ubgen.synth.config import SynthConfig

_SHOWN = 3  # of many that are alike


def class_prompts(classes: ClassList, template: str, overrides: Path | None) -> tuple[str, ...]:
    """The prompt of every class, in label order: `template` with {name} replaced, or what `overrides` says.

    `overrides` is a UTF-8 text file of "id<TAB>prompt" lines. UserError for a line that is not of that form, an id that
    is not in the list, and an id that comes twice.
    """
    prompts = {
        c: template.replace("{name}", name) for c, name in zip(classes.ids, classes.names, strict=True)
    }
    seen = set[str]()
    for number, line in enumerate(_lines(overrides) if overrides else [], start=1):
        if not line.strip():
            continue
        class_id, _, prompt = (part.strip() for part in line.partition("\t"))
        where = f"{overrides}, line {number}"
        if not prompt or "\t" in prompt:
            raise UserError(f'{where}: expected "id<TAB>prompt"')
        if class_id not in prompts:
            raise UserError(f"{where}: no class has the id {class_id!r}")
        if class_id in seen:
            raise UserError(f"{where}: the id {class_id!r} came before")
        seen.add(class_id)
        prompts[class_id] = prompt
    return tuple(prompts[c] for c in classes.ids)


def _lines(path: Path) -> list[str]:
    try:
        return path.expanduser().read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}") from None


def check_prompts(
    config: SynthConfig, classes: ClassList, prompts: Sequence[str], engine: Mapping[str, Any]
) -> list[str]:
    """Lines for the dataset's card: classes whose prompts are equal, and prompts of which the end is lost.

    `engine` is the engine's manifest. Cut prompts are warned of. UserError naming the first classes whose images could
    not be told apart, unless `config.same_prompts` allows it, or the class list is a shipped one that has such names.
    """
    limit = engine["engine"]["networks"]["text_encoder"]["signature"]["inputs"][0]["shape"][1]
    tokens, texts = _tokenize(Path(config.engine) / "tokenizer", prompts)
    notes = []
    for class_id, ids, words in zip(classes.ids, tokens, texts, strict=True):
        if len(ids) > limit:
            kept = limit - 1  # the last token is the end of the text
            lost = prompts[classes.ids.index(class_id)][words[kept][0] :].strip()
            notes.append(f"The prompt of {class_id} is cut after {limit} tokens; lost: {lost!r}.")
    for note in notes[:_SHOWN]:
        warn(note)
    if len(notes) > _SHOWN:
        warn(f"{len(notes) - _SHOWN} more prompts are cut; the dataset's card names them")
    pairs = _equal([(*ids[: limit - 1], ids[-1]) for ids in tokens], classes)
    allowed = config.same_prompts or _is_shipped(config)
    for a, b in pairs:
        line = f"classes {a} and {b} have the same prompt, so that their images cannot differ"
        if not allowed:
            raise UserError(f"{line}; give each its own with --prompts, or pass --same-prompts")
        notes.append(f"{line[0].upper()}{line[1:]}.")
    if pairs:
        warn(f"{notes[-1][:-1]}{f' ({len(pairs)} such pairs)' if len(pairs) > 1 else ''}; see --prompts")
    return notes


def _tokenize(directory: Path, prompts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids of whole prompts, and the characters that each token stands for."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    tokens = tokenizer(list(prompts), truncation=False, return_offsets_mapping=True, verbose=False)
    return tokens["input_ids"], tokens["offset_mapping"]


def _equal(tokens: Sequence[tuple[int, ...]], classes: ClassList) -> list[tuple[str, str]]:
    """Ids of each class whose tokens an earlier one has, and of that one."""
    first: dict[tuple[int, ...], str] = {}
    pairs = []
    for class_id, ids in zip(classes.ids, tokens, strict=True):
        if (earlier := first.setdefault(ids, class_id)) != class_id:
            pairs.append((earlier, class_id))
    return pairs


def _is_shipped(config: SynthConfig) -> bool:
    return config.classes in shipped_lists() and config.prompts is None and config.prompt == "{name}"
