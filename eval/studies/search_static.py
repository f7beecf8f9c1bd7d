"""``python -m maskgym.eval search-static``: the best plan that is the same for every query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskgym.backbones import Backbone
from maskgym.envs import load_queries
from maskgym.eval import cli
from maskgym.eval.measure import report
from maskgym.eval.measure.failures import working
from maskgym.eval.pricing import Pricing
from maskgym.policies.static.search import SearchSettings, search_order
from maskgym.policies.static.searched import SearchedOrder

BATCH = 128


@dataclass
class SearchStatic(cli.Placement, Pricing):
    """Search for the order in which tokens, head slots and layers may leave for every query alike.

    The policy static:plan=FILE then drops in that order until a plan fits its budget. Each step drops what moves the
    first answer token's distribution least for the FLOPs that it saves (GSOP / DOP, arXiv 2507.02909).

    Example: python -m maskgym.eval search-static --data scenes --out static.json
    """

    out: Path
    """Write the order there."""
    backbone: str = "tiny"
    """Which VLM."""
    data: str = "easy-vqa"
    """Queries: a name, or a path with the columns image, question, answers."""
    split: str = "validation"
    """train, validation or test; not the one that policies are compared on."""
    queries: int = 256
    """Use so many queries, spread over the split."""
    token_groups: int = 64
    """Visual tokens leave in so many groups, each spread over the image."""
    tries: int = 8
    """Units tried at each step; more is slower and may find better."""

    def run(self) -> None:
        for option in ("queries", "token_groups", "tries"):
            if getattr(self, option) < 1:
                raise cli.InputError(f"--{option.replace('_', '-')} is {getattr(self, option)}; it must be at least 1")
        cli.check_output("--out", self.out)
        self.check_price()
        backbone = self.load(self.backbone)
        self.price(backbone, self.data, load_queries(self.data, self.split))
        settings = SearchSettings(self.token_groups, self.tries)
        found = search(backbone, self.data, self.split, self.queries, settings)
        found.save(self.out)
        print(report.markdown(_at_shares(found.flops, found.divergence)))
        print(f"{len(found.order)} units in order: python -m maskgym.eval run static:plan={self.out}")


def search(backbone: Backbone, data: str, split: str, queries: int, settings: SearchSettings) -> SearchedOrder:
    """Search on so many queries, spread over the split."""
    bank, _ = working(backbone, load_queries(data, split).spread(queries))
    batches = [range(start, min(start + BATCH, len(bank))) for start in range(0, len(bank), BATCH)]
    return search_order(backbone, [bank.gather(batch) for batch in batches], data, split, settings)


def _at_shares(flops: Sequence[float], divergence: Sequence[float]) -> list[tuple[str, str]]:
    """How far answers move where the plan first costs no more than some shares."""
    rows = [("LLM FLOPs %", "divergence, nats")]
    for share in (0.75, 0.5, 0.25):
        first = next((place for place, spent in enumerate(flops) if spent <= share), None)
        if first is not None:
            rows.append((f"{100 * flops[first]:.1f}", f"{divergence[first]:.4f}"))
    return rows
