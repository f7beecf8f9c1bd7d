"""One adapter a family."""

from backbones.families.idefics3 import Idefics3Family
from backbones.families.llava import LlavaFamily
from backbones.families.llava_next import LlavaNextFamily
from backbones.families.qwen2_5_vl import Qwen25VLFamily
from backbones.family import Family

FAMILIES: dict[str, type[Family]] = {
    model_type: family
    for family in (LlavaFamily, LlavaNextFamily, Idefics3Family, Qwen25VLFamily)
    for model_type in family.model_types
}

__all__ = ["FAMILIES"]
