"""One adapter a family."""

from maskgym.backbones.families.family import Family
from maskgym.backbones.families.idefics3 import Idefics3Family
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.families.llava_next import LlavaNextFamily
from maskgym.backbones.families.qwen2_5_vl import Qwen25VLFamily

FAMILIES: dict[str, type[Family]] = {
    model_type: family
    for family in (LlavaFamily, LlavaNextFamily, Idefics3Family, Qwen25VLFamily)
    for model_type in family.model_types
}

__all__ = ["FAMILIES"]
