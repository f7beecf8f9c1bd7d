"""The cost conventions of published papers, to compare our figures with theirs.

They differ from ``maskgym.backbones.plans.cost`` and from each other; nothing is trained or budgeted with them.
"""

from __future__ import annotations


def fastv_layer_macs(n: float, hidden: int, intermediate: int) -> float:
    """Multiply-accumulates of one layer as FastV counts them (arXiv 2403.06764, Eq. 5): two MLP matrices, not three.

    Args:
        n: sequence length in tokens.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
    """
    return 4 * n * hidden**2 + 2 * n * n * hidden + 2 * n * hidden * intermediate


def fastv_mean_layer_macs(
    text: int, image: int, layers: int, hidden: int, intermediate: int, filter_layer: int, removed: float
) -> float:
    """FastV's table figure: mean MACs per layer when a share ``removed`` of the image tokens leaves at a layer."""
    before = fastv_layer_macs(text + image, hidden, intermediate)
    after = fastv_layer_macs(text + image * (1 - removed), hidden, intermediate)
    return (filter_layer * before + (layers - filter_layer) * after) / layers


def adallava_prefill_flops(n: int, layers: int, hidden: int, intermediate: int, heads: int, vocab: int) -> float:
    """Prefill FLOPs as AdaLLaVA's analyser counts them (arXiv 2503.10905): linears, attention, softmax, norms,
    residuals and activation, and the output head once without the factor two."""
    linears = 2 * n * (4 * hidden**2 + 3 * hidden * intermediate)
    attention = 4 * n * n * hidden + 5 * heads * n * n
    elementwise = 14 * n * hidden + 2 * n * hidden + 2 * n * hidden
    return layers * (linears + attention + elementwise) + hidden * vocab


def adallava_layer_share(budget: float, layers: int) -> float:
    """The share of layers that AdaLLaVA-L really runs at a budget: whole layers, never fewer than half."""
    return max(int(layers * budget), layers // 2) / layers
