"""LoRA adapters, merged into the model that they were trained on.

PEFT reads more from an adapter's folder than weights: pickles where safetensors are missing, modules to import by name,
other kinds of adapters that load tokenizers. Here a folder gives plain settings of LoRA, and safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maskgym.common.errors import InputError
from maskgym.common.plain_files import MALFORMED, read_json
from maskgym.common.tensor_files import tensor_shapes

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PLAIN = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "lora_bias"),
    *("use_rslora", "use_dora", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern"),
}
"""Settings that say what is adapted, and how; nothing else may differ from PEFT's defaults."""

NOTES = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
"""Entries that are not settings, and are not followed."""


def holds_adapters(where: str | Path) -> bool:
    """Whether adapters lie in a folder."""
    return isinstance(where, Path) and (where / SETTINGS).is_file()


def base_of(folder: Path, name: str) -> str:
    """The model that a folder's adapters were trained on, as it is named there.

    Raises:
        InputError: unreadable settings.
    """
    return str(_settings(folder, name)["base_model_name_or_path"])


def merged(model: Any, folder: Path, name: str) -> Any:
    """The model with adapters as a part of its weights.

    Args:
        model: that they were trained on.
        folder: where they lie.
        name: of the backbone, in messages.

    Raises:
        InputError: adapters of another kind or with settings that are not plain, or weights that do not fit these.
    """
    from peft import LoraConfig, PeftModel  # takes seconds to import, and few need it

    fields, defaults = _settings(folder, name), LoraConfig().to_dict()
    defaults["init_lora_weights"] = fields.get("init_lora_weights") is not False  # other ways change the model, too
    strange = [key for key in fields.keys() - PLAIN - NOTES if fields[key] != defaults.get(key, ...)]
    if fields.get("peft_type") != "LORA" or strange:
        what = f"the setting {sorted(strange)[0]!r}" if strange else f"the kind {fields.get('peft_type')!r}"
        raise InputError(f"backbone {name!r} has adapters of {what}, which is not taken; merge them into their model")
    plain: dict[str, Any] = {key: value for key, value in fields.items() if key in PLAIN}
    if not (folder / WEIGHTS).is_file() or not _fit(plain, tensor_shapes(folder / WEIGHTS).values()):
        raise InputError(f"backbone {name!r} has no {WEIGHTS} that fits its {SETTINGS}; save the adapters again")
    return PeftModel.from_pretrained(model, folder, config=LoraConfig(inference_mode=True, **plain)).merge_and_unload()


def _fit(plain: dict[str, Any], shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether no rank is beyond all tensors that are there: memory is taken for ranks first."""
    ranks = [plain.get("r", 0), *(plain.get("rank_pattern") or {}).values()]
    return max(ranks) <= max((size for shape in shapes for size in shape), default=0)


def _settings(folder: Path, name: str) -> dict[str, Any]:
    try:
        fields = read_json(folder / SETTINGS)
        fields["base_model_name_or_path"]
    except MALFORMED as error:
        raise InputError(
            f"backbone {name!r} has an unreadable {SETTINGS} ({error!r}); save the adapters again"
        ) from error
    return fields
