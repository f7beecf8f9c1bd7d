"""What a plan keeps, drawn: tokens over the image, and heads x layers.

Shape legend: n visual tokens of an image, L layers, H head slots.
"""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from maskgym.backbones.encodings.images import upright_rgb
from maskgym.envs.frames import darkened

DROPPED, KEPT = "#dddddd", "#1f77b4"


def show_tokens(axes: Axes, image: Image.Image, tokens_n: np.ndarray) -> None:
    """The image with the patches of dropped tokens dark."""
    _bare(axes)
    axes.imshow(darkened(np.asarray(upright_rgb(image, "the image")), tokens_n))


def show_heads(axes: Axes, heads_LH: np.ndarray) -> None:
    """A row a layer, the first on top, a column a head slot."""
    _bare(axes)
    axes.imshow(heads_LH, cmap=ListedColormap([DROPPED, KEPT]), vmin=0, vmax=1, aspect="equal")


def plan_png(image: Image.Image, tokens_n: np.ndarray, heads_LH: np.ndarray) -> bytes:
    """Both, one below the other, as a PNG that suits light and dark pages."""
    figure = Figure(figsize=(3, 4.9), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1.8))
    show_tokens(above, image, tokens_n)
    for spine in above.spines.values():
        spine.set(visible=True, color="0.7")
    show_heads(below, heads_LH)
    layers, heads = heads_LH.shape
    below.set_xlabel(f"{heads} head slots", color="0.5", fontsize=9)
    below.set_ylabel(f"{layers} layers", color="0.5", fontsize=9)
    below.set_xticks(np.arange(0.5, heads - 1), minor=True)
    below.set_yticks(np.arange(0.5, layers - 1), minor=True)
    below.grid(which="minor", color="white", linewidth=min(2.0, 40 / max(layers, heads)))
    below.tick_params(which="minor", length=0)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, transparent=True)
    return file.getvalue()


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
