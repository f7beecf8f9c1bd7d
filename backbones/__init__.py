"""The ground: plans, their cost, encodings, masked execution, and the VLMs."""

from maskgym.backbones.answers import Answers
from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding, EncodingBank, Query
from maskgym.backbones.loading.load import load_backbone
from maskgym.backbones.plans.cost import Cost
from maskgym.backbones.plans.masks import MaskLayout, Masks
from maskgym.common.errors import InputError

__all__ = [
    "Answers",
    "Backbone",
    "Cost",
    "Encoding",
    "EncodingBank",
    "InputError",
    "MaskLayout",
    "Masks",
    "Query",
    "load_backbone",
]
