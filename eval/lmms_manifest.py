"""What lmms-eval finds under the entry point ``maskgym`` of the group ``lmms_eval.models``.

It lies apart from the plug-in because every start of lmms-eval imports it, whichever model is then evaluated: nothing
else is imported here.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Says that ``--model maskgym`` is ``maskgym.lmms.model.MaskGym``."""
    return ModelManifest(model_id="maskgym", simple_class_path="maskgym.lmms.model.MaskGym")
