"""The ground: plans, their cost, encodings, masked execution, and the VLMs."""

from maskgym.backbones.answers import Answers
from maskgym.backbones.backbone import Backbone
from maskgym.backbones.cost import Cost
from maskgym.backbones.encoding import Encoding, EncodingBank, Query
from maskgym.backbones.errors import InputError
from maskgym.backbones.loading import load_backbone
from maskgym.backbones.masks import MaskLayout, Masks

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
