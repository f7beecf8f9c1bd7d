"""First lessons of a vision tower that starts from random weights: what stands at each of its patches, told in the
words of the language model that will read it.

Shape legend: B images, N visual tokens, D hidden width of the language model, K words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgym.envs.data.scene_questions import COLORS, SHAPES

WORDS = (COLORS, SHAPES, ("small", "large"))


class Lessons(nn.Module):
    """What is asked of each visual token: the colour, shape and size there, where the thing's middle is, and how much
    of the patch it covers.

    Args:
        words_KD: the language model's embeddings of colours, shapes and sizes, in the order of ``WORDS``. A token that
            points where a word does says that word.
    """

    words_KD: Tensor

    def __init__(self, words_KD: Tensor):
        super().__init__()
        words_KD = words_KD - words_KD.mean(0)
        self.register_buffer("words_KD", F.normalize(words_KD, dim=-1), persistent=False)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.place = nn.Linear(words_KD.shape[1], 3)

    def forward(self, visual_BND: Tensor, lessons_BN6: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and (4,) shares of patches whose colour, shape, size and all three are told right."""
        visual_BND = visual_BND.float()
        logits_BNK = self.scale * F.normalize(visual_BND, dim=-1) @ self.words_KD.T
        there_BN = lessons_BN6[..., 0] >= 0
        loss = visual_BND.new_zeros(())
        right: list[Tensor] = []
        start = 0
        for number, words in enumerate(WORDS):
            logits_PK = logits_BNK[..., start : start + len(words)][there_BN]
            wanted_P = lessons_BN6[..., number][there_BN].long()
            loss = loss + F.cross_entropy(logits_PK, wanted_P)
            right.append(logits_PK.argmax(-1) == wanted_P)
            start += len(words)
        told_BN3 = self.place(F.layer_norm(visual_BND, visual_BND.shape[-1:]))
        away_BN2 = F.smooth_l1_loss(told_BN3[..., :2], lessons_BN6[..., 3:5], reduction="none").mean(-1)
        loss = loss + away_BN2[there_BN].mean() + 4 * F.mse_loss(told_BN3[..., 2], lessons_BN6[..., 5])
        shares = torch.stack([*right, right[0] & right[1] & right[2]]).float().mean(1)
        return loss, shares.detach()
