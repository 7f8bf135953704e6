"""Hugging Face: a model of any family of `transformers`, from its configuration and random weights.

Nothing is downloaded. What a size means is a table of roles: the names of configuration fields say
which role a field has, so no family needs code of its own. What the model is called with follows
from the name of its main input, the signature of its `forward`, and the configuration.
"""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import nn

from normfx.cli.errors import ModelError, UsageError, one_line
from normfx.cli.models import Loaded

# role -> names of fields, and the value at each size. A default that is smaller stays.
_ROLES: dict[str, tuple[str, tuple[int, int, int]]] = {
    "width": (
        r"(\w+_)?(hidden_size|d_model|n_embd|embedding_size|hidden_dim|projection_dim|lru_width)",
        (64, 256, 768),
    ),
    "inner": (
        r"(\w+_)?(intermediate_size|ffn_dim|n_inner|dim_feedforward|feedforward_dim)",
        (128, 1024, 3072),
    ),
    "layers": (
        r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth|num_(en|de)coder_layers",
        (2, 4, 12),
    ),
    "heads": (r"(\w+_)?(attention_heads|num_heads|n_head)|linear_num_value_heads", (4, 4, 12)),
    "shared heads": (
        r"num_key_value_heads|linear_num_key_heads|num_experts_per_tok|topk_group|n_group",
        (2, 2, 4),
    ),
    "head": (
        r"head_dim|linear_(key|value)_head_dim|v_head_dim|qk_nope_head_dim|index_head_dim",
        (16, 64, 64),
    ),
    "rotary": (r"qk_rope_head_dim|rotary_dim", (8, 32, 32)),
    "rank": (
        r"(q|kv)_lora_rank|moe_intermediate_size|shared_expert_intermediate_size|index_topk"
        r"|hidden_size_per_layer_input",
        (32, 128, 384),
    ),
    "experts": (r"num_experts|num_local_experts|n_routed_experts|index_n_heads", (4, 4, 8)),
    "words": (r"(\w+_)?vocab_size(_\w+)?", (256, 4096, 32768)),
    "positions": (r"max_position_embeddings|n_positions|max_source_positions", (128, 512, 2048)),
}
# Which roles are scaled: where the widths of a family have to fit each other, fewer are.
_ATTEMPTS = (
    frozenset(_ROLES),
    frozenset({"layers", "words", "positions", "experts"}),
    frozenset({"layers", "experts"}),
)
_LARGEST = 1_000_000_000
_SIZES = ("tiny", "small", "base")
_STAGES = re.compile(r"depths|layers|num_layers|stage_num_blocks|num_blocks|depth|layer_depths")
_STAGE_DEPTH = (1, 2, 1_000)
_TOKEN = re.compile(r"\w*_(id|index)")
_IMAGE = (64, 128, 224)

_BATCH, _TOKENS, _FRAMES, _SAMPLES = 2, 16, 64, 4000
# Token ids below are often special ones (padding, the end), and those above placeholders.
_FIRST_TOKEN, _LAST_TOKEN = 8, 200


def build(name: str) -> Loaded:
    """The model of `hf:FAMILY[:SIZE]` in eval mode, and what it is called with.

    Raises:
        UsageError: there is no such family or size, or no `transformers`.
        ModelError: the family cannot be built from its configuration alone.
    """
    _, _, rest = name.partition(":")
    family, _, size = rest.partition(":")
    size = size or "tiny"
    if size not in _SIZES:
        raise UsageError(f"{name}: expected a size of {', '.join(_SIZES)}, got {size!r}")
    try:
        from transformers import AutoModel
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise UsageError(f"{name} needs transformers: pip install transformers") from error
    from transformers.utils import logging

    logging.set_verbosity_error()
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, list(CONFIG_MAPPING.keys()), n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"{name}: transformers has no family {family!r}{meant}")
    first: Exception | None = None
    for roles in _ATTEMPTS:
        try:
            return _built(CONFIG_MAPPING[family], AutoModel, _SIZES.index(size), roles)
        except Exception as error:  # sizes that do not fit each other, say
            first = first or error
    assert first is not None
    raise ModelError(
        f"{name} cannot be built from its configuration alone ({one_line(first)}). Write a "
        "factory, and pass package.module:factory"
    ) from first


def _built(config_class: Any, auto: Any, size: int, roles: frozenset[str]) -> Loaded:
    """A model that runs."""
    config = _without_cache(config_class(**_values(config_class, size, roles)))
    with torch.device("meta"):
        numbers = sum(p.numel() for p in auto.from_config(config).parameters())
    if numbers > _LARGEST:
        raise ModelError(f"it has {numbers / 1e9:.1f} billion parameters at this size")
    model = auto.from_config(config).float().eval()
    _roughen(model)
    inputs = _inputs(model, config)
    with torch.no_grad():
        model(**inputs)  # so that what does not fit is known here
    return Loaded(model, (), inputs)


# ---------------------------------------------------------------------------- the configuration


def _values(
    config_class: Any, size: int, roles: frozenset[str], given: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Values that give a configuration a size, by the names of its fields."""
    values = dict(given or {})
    known = dict(_defaults(config_class))
    token = _ROLES["words"][1][size] - 1
    for name, default in known.items():
        if isinstance(default, bool) or name in values:
            continue
        if isinstance(default, int):
            role = _role(name)
            if role in roles and (default > 1 or role == "layers"):
                values[name] = min(_ROLES[role][1][size], default)
            elif "words" in roles and _TOKEN.fullmatch(name) and default > token - 16:
                values[name], token = token, token - 1
        elif isinstance(default, (tuple, list)) and _STAGES.fullmatch(name):
            if all(type(depth) is int for depth in default):
                values[name] = type(default)(min(d, _STAGE_DEPTH[size]) for d in default)
    if "kv_lora_rank" in known and "num_key_value_heads" in values:  # latent heads are not shared
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)
    if "image_size" in known and "image_size" not in values and "width" in roles:
        values["image_size"] = _image_size(known, size)
    for name, spec in (getattr(config_class, "sub_configs_defaults", None) or {}).items():
        if getattr(spec, "optional", False) and known.get(name) is None:
            continue
        values[name] = _part(spec, size, roles)
    return {name: value for name, value in values.items() if value is not None}


def _defaults(config_class: Any) -> Any:
    for one in fields(config_class):
        if one.default is not MISSING:
            yield one.name, one.default
        elif one.default_factory is not MISSING:
            yield one.name, one.default_factory()


def _role(name: str) -> str | None:
    for role, (pattern, _) in _ROLES.items():
        if re.fullmatch(pattern, name):
            return role
    return None


def _image_size(known: dict[str, Any], size: int) -> Any:
    patch, default = known.get("patch_size"), known["image_size"]
    side = _IMAGE[size]
    if isinstance(patch, int) and patch:
        side = max(4 * patch, side // patch * patch)
    if isinstance(default, int):
        return min(side, default)
    if isinstance(default, (tuple, list)):
        return type(default)(min(side, length) for length in default)
    return None


def _part(spec: Any, size: int, roles: frozenset[str]) -> Any:
    """The configuration of a part (its text model, its image encoder)."""
    fixed = getattr(spec.config_class, "model_type", "")
    auto = spec.config_class.__name__ == "AutoConfig" or (fixed and fixed != spec.model_type)
    part_class = spec.get_config_class(spec.model_type) if auto else spec.config_class
    values = _values(part_class, size, roles, dict(spec.init_kwargs or {}))
    if spec.model_type:
        return {"model_type": spec.model_type, **values}
    return part_class(**values)


def _without_cache(config: Any) -> Any:
    """The configuration, without key-value caches, in its parts too."""
    pending, seen = [config], set()
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if hasattr(current, "use_cache"):
            current.use_cache = False
        pending += [part for part in vars(current).values() if hasattr(part, "model_type")]
    return config


@torch.no_grad()
def _roughen(model: nn.Module) -> None:
    """Gives scales, shifts and running statistics values as training leaves them.

    Fresh ones are one and zero, and hide what a rule does to them.
    """
    generator = torch.Generator().manual_seed(0)
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        if held.dim() != 1 or not held.is_floating_point() or "norm" not in name.lower():
            continue
        held.mul_(0.75 + torch.rand(held.shape, generator=generator) / 2)
        if not name.endswith("running_var"):
            held.add_(torch.rand(held.shape, generator=generator) / 5 - 0.1)


# ---------------------------------------------------------------------------- the inputs


def _inputs(model: nn.Module, config: Any) -> dict[str, Any]:
    """The keyword arguments of one call."""
    accepted = inspect.signature(model.forward).parameters
    named: Any = getattr(model, "main_input_name", "input_ids")
    main = named if isinstance(named, str) else next(iter(named))
    shape = _shape(main, config)
    if {"grid_thw"} <= set(accepted):  # patches of images, already cut
        main = "hidden_states" if "hidden_states" in accepted else "pixel_values"
        return {main: torch.randn(_BATCH * 16, _patch(config)), "grid_thw": _grid()}
    found: dict[str, Any] = {}
    if "input_ids" in accepted and main not in ("inputs_embeds", "hidden_states"):
        found["input_ids"] = _ids(_TOKENS)
        if "attention_mask" in accepted:
            found["attention_mask"] = torch.ones(_BATCH, _TOKENS, dtype=torch.long)
    if shape is not None:
        found[main] = torch.randn(shape)
    elif main not in found:
        raise ModelError(f"its main input is {main!r}, which is not known how to make")
    images = accepted.get("pixel_values")
    if images is not None and (_is_required(images) or _joins_images_and_text(config)):
        found["pixel_values"] = torch.randn(_images(_vision(config)))
    if "decoder_input_ids" in accepted:
        found["decoder_input_ids"] = _ids(_TOKENS // 2)
    for name in ("use_cache", "return_loss"):
        if name in accepted:
            found[name] = False
    return found


def _shape(main: str, config: Any) -> list[int] | None:
    """The shape of a main input that is no row of tokens, or None."""
    if main in ("pixel_values", "pixel_values_videos"):
        images = _images(config)
        frames = _first(config, "num_frames", "frames_per_clip", default=0)
        if main == "pixel_values_videos":
            frames = frames or 4
        return [images[0], frames, *images[1:]] if frames else images
    if main == "input_values":
        channels = getattr(config, "audio_channels", None)
        return [_BATCH, _SAMPLES] if channels is None else [_BATCH, channels, _SAMPLES]
    bins = _first(
        config,
        *("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel"),
        default=80,
    )
    if main == "input_features":
        positions = getattr(config, "max_source_positions", None)
        if positions and hasattr(config, "num_mel_bins") and "conv" not in config.model_type:
            return [_BATCH, bins, 2 * positions]
        return [_BATCH, _FRAMES, bins]
    if main == "spectrogram":
        return [_BATCH, _FRAMES, _first(config, "num_mel_bins", "model_in_channels", default=80)]
    if main in ("inputs_embeds", "hidden_states"):
        return [_BATCH, _TOKENS, _first(config, "hidden_size", "d_model", default=64)]
    if main == "past_values":
        length = _first(config, "context_length", default=32)
        channels = _first(config, "num_input_channels", default=0)
        return [_BATCH, length, channels] if channels else [_BATCH, length]
    return None


def _ids(length: int) -> torch.Tensor:
    return torch.randint(_FIRST_TOKEN, _LAST_TOKEN, (_BATCH, length))


def _first(config: Any, *names: str, default: int) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), default)


def _images(config: Any) -> list[int]:
    channels = _first(config, "num_channels", "in_channels", "in_chans", default=3)
    side: Any = _first(config, "image_size", "input_size", "crop_size", default=64)
    sides = [side, side] if isinstance(side, int) else list(side)[-2:]
    return [_BATCH, channels, *sides]


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _joins_images_and_text(config: Any) -> bool:
    """Whether a model compares images with texts (CLIP), and does not put them among its tokens."""
    parts = [getattr(config, name, None) for name in ("vision_config", "text_config")]
    names = vars(config)
    placeholder = any(name.startswith("image_token") for name in names)
    return all(parts) and not placeholder


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _patch(config: Any) -> int:
    side: Any = _first(config, "patch_size", default=14)
    side = side if isinstance(side, int) else side[0]
    channels = _first(config, "in_channels", "in_chans", "num_channels", default=3)
    return channels * side * side * _first(config, "temporal_patch_size", default=1)


def _grid() -> torch.Tensor:
    return torch.tensor([[1, 4, 4]] * _BATCH)
