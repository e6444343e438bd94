"""Q-Align's config.json: the sizes of its three parts, and how the score is read."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from ubgen.core.errors import UserError

# "USER: How would you rate the quality of this image?\n<image>\nASSISTANT: The quality of the image is", in
# ids of the LLaMA tokenizer; -200 stands for the image. Constants, so that no tokenizer is needed at run time.
PROMPT_IDS = (
    *(1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13),
    -200,
    *(29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338),
)


@dataclass(frozen=True)
class VisionConfig:
    """`visual_config.visual_model`: a ViT."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2 + 1


@dataclass(frozen=True)
class AbstractorConfig:
    """`visual_config.visual_abstractor`: learned queries that read the image tokens."""

    num_learnable_queries: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-6  # of the norm inside the FFN only; the other norms use 1e-5


@dataclass(frozen=True)
class ScoringConfig:
    """Section `scoring`: the prompt with the image's marker in it, and the level words with their weights."""

    image_token_index: int = -200
    level_token_ids: tuple[int, ...] = (15129, 1781, 6534, 6460, 4319)  # excellent, good, fair, poor, bad
    level_weights: tuple[float, ...] = (5.0, 4.0, 3.0, 2.0, 1.0)
    prompt_ids: tuple[int, ...] = PROMPT_IDS


@dataclass(frozen=True)
class QAlignConfig:
    """The whole config.json; the language model's sizes are at its top level."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vision: VisionConfig
    abstractor: AbstractorConfig
    scoring: ScoringConfig = ScoringConfig()
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "QAlignConfig":
        """Read the public checkpoint's field names. UserError on a missing field or an unsupported value."""
        visual = _section(config, "visual_config", "config")
        vision = _pick(VisionConfig, _section(visual, "visual_model", "visual_config"), "visual_model")
        settings = _section(visual, "visual_abstractor", "visual_config")
        abstractor = _pick(AbstractorConfig, settings, "visual_abstractor")
        scoring = _pick(ScoringConfig, config.get("scoring") or {}, "scoring")
        made = _pick(
            cls, {**config, "vision": vision, "abstractor": abstractor, "scoring": scoring}, "config"
        )
        _check_options(config, settings, made)
        _check_sizes(made)
        return made


def _section(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    if not isinstance(config.get(key), dict):
        raise UserError(f"Q-Align config: {where} has no section {key!r}")
    return config[key]


def _pick(cls: type, values: dict[str, Any], where: str) -> Any:
    """The dataclass's own fields out of a larger dictionary; a null counts as absent."""
    chosen = {}
    for field in fields(cls):
        value = values.get(field.name)
        if value is not None:
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is MISSING:
            raise UserError(f"Q-Align config: {where} lacks the field {field.name!r}")
    return cls(**chosen)


def _check_options(config: dict[str, Any], abstractor: dict[str, Any], made: QAlignConfig) -> None:
    """Fields with one value that this implementation (and the published checkpoint) has."""
    vision, queries = made.vision, made.abstractor
    fixed = [
        ("hidden_act", config.get("hidden_act"), "silu"),
        ("num_key_value_heads", config.get("num_key_value_heads"), made.num_attention_heads),
        ("rope_scaling", config.get("rope_scaling"), None),
        ("attention_bias", config.get("attention_bias"), False),
        ("tie_word_embeddings", config.get("tie_word_embeddings"), False),
        ("visual_abstractor.encoder_hidden_size", abstractor.get("encoder_hidden_size"), vision.hidden_size),
        ("visual_abstractor.hidden_size", queries.hidden_size, vision.hidden_size),
        ("visual_abstractor.grid_size", abstractor.get("grid_size"), vision.grid),
    ]
    for name, value, only in fixed:
        if value is not None and value != only:
            raise UserError(f"Q-Align config: {name} must be {only!r}, not {value!r}")


def _check_sizes(config: QAlignConfig) -> None:
    vision, queries, scoring = config.vision, config.abstractor, config.scoring
    rules = [
        (
            config.hidden_size % (2 * config.num_attention_heads) == 0,
            "hidden_size / num_attention_heads is not even",
        ),
        (
            vision.hidden_size % vision.num_attention_heads == 0,
            "visual_model: heads do not divide hidden_size",
        ),
        (
            queries.hidden_size % queries.num_attention_heads == 0,
            "visual_abstractor: heads do not divide hidden_size",
        ),
        (queries.hidden_size % 4 == 0, "visual_abstractor: hidden_size is not a multiple of 4"),
        (vision.image_size % vision.patch_size == 0, "visual_model: patch_size does not divide image_size"),
        (
            len(scoring.level_token_ids) == len(scoring.level_weights),
            "scoring: level_token_ids and level_weights differ in length",
        ),
        (
            scoring.prompt_ids.count(scoring.image_token_index) == 1,
            f"scoring.prompt_ids must hold the marker {scoring.image_token_index} once",
        ),
        (
            all(0 <= i < config.vocab_size for i in scoring.level_token_ids),
            f"scoring.level_token_ids are not all within the vocabulary of {config.vocab_size}",
        ),
    ]
    for fine, complaint in rules:
        if not fine:
            raise UserError(f"Q-Align config: {complaint}")
