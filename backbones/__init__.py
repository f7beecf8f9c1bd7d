"""The ground: plans, their cost, encodings, masked execution, and the VLMs."""

from backbones.cost import Cost
from backbones.encoding import Encoding, EncodingBank, Query
from backbones.errors import InputError
from backbones.llava import Answers, LlavaBackbone
from backbones.loading import load_backbone
from backbones.masks import MaskLayout, Masks

__all__ = [
    "Answers",
    "Cost",
    "Encoding",
    "EncodingBank",
    "InputError",
    "LlavaBackbone",
    "MaskLayout",
    "Masks",
    "Query",
    "load_backbone",
]
