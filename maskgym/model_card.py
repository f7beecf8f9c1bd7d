"""The README of a controller on the hub."""

from __future__ import annotations

from collections.abc import Sequence

from maskgym.backbones.backbone import Backbone
from maskgym.eval.measure.evaluate import Record
from maskgym.eval.measure.report import table


def model_card(name: str, backbone: Backbone, whole: bool, records: Sequence[Record]) -> str:
    """A model card in Markdown.

    Args:
        name: of the controller; its hub id once it has one.
        backbone: that it was trained for.
        whole: whether the backbone's weights lie beside it.
        records: what was measured with it; may be none.
    """
    layout = backbone.layout
    on_hub = not whole and backbone.name.count("/") == 1
    head = ["library_name: maskgym", "pipeline_tag: image-text-to-text"]
    head += [f"base_model: {backbone.name}"] * on_hub
    where = "the VLM in `model/`" if whole else f"the VLM `{backbone.name}`"
    text = f"""# {name}

A maskgym controller for {where}: for each image, question and compute budget it chooses which of {layout.tokens} visual
tokens, {layout.layers} x {layout.heads} head slots and {layout.layers} layers the VLM computes.

```python
from maskgym import AdaptiveVLM

vlm = AdaptiveVLM.from_pretrained("{name}")
reply = vlm.generate("image.png", "what is this?", budget=0.5)
print(reply.text, reply.llm_flops_ratio)
```
"""
    if records:
        text += f"\nMeasured at the end of training:\n\n{table(records)}\n"
    return "\n".join(["---", *head, "---", text])
