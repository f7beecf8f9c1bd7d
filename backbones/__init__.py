"""The ground: plans, their cost, encodings, masked execution, and the VLMs."""

from backbones.backbone import Answers, Backbone
from backbones.cost import Cost
from backbones.encoding import Encoding, EncodingBank, Query
from backbones.errors import InputError
from backbones.loading import load_backbone
from backbones.masks import MaskLayout, Masks

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
