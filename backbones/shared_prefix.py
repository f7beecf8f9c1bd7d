"""Several questions about one image in one sequence: the image is read once, and no question sees another.

The visual tokens stand before the question, so under the causal rule they do not depend on it. In training with the
full plan a step on 8 questions an image then costs about a third of 8 sequences. Runs the model's own decoder.

Shape legend: B images, S sequence places, P prefix places, D hidden width, V vocabulary, T answer tokens in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import EncodedImage

PREFIX, PADDING = -1, -2


def can_share(backbone: Backbone) -> bool:
    """Whether questions can share an image: where rotary positions count places and nothing but visual tokens, as many
    for every image, stands in the image's span."""
    return backbone.model.config.model_type == "llava"


def answer_logits(
    backbone: Backbone,
    images: Sequence[EncodedImage],
    questions: Sequence[Sequence[str]],
    answers: Sequence[Sequence[list[int]]],
) -> Tensor:
    """Logits (T, V), in float32, at the places that predict each answer's tokens and its end, answer after answer;
    differentiable.

    Args:
        backbone: one that ``can_share``.
        images: B encoded images.
        questions: of each image.
        answers: of each question, as ids without an end token.
    """
    embed = backbone.decoder.model.embed_tokens
    before = backbone.prompt_ids("")[0]
    visual_BND = torch.stack([image.visual_nD for image in images])
    device = visual_BND.device
    prefix = len(before) + visual_BND.shape[1]
    rows = [_lay_out(backbone, asked, given, prefix) for asked, given in zip(questions, answers, strict=True)]
    longest = max(len(ids) for ids, _, _, _ in rows)
    ids_BS, places_BS, owner_BS, asked_BS = (
        torch.tensor([row + [filler] * (longest - len(row)) for row in column], device=device)
        for column, filler in zip(zip(*rows, strict=True), (0, 0, PADDING, 0), strict=True)
    )
    start_BPD = embed(torch.tensor(before, device=device)).expand(len(images), -1, -1)
    x_BSD = torch.cat([start_BPD, visual_BND, embed(ids_BS)], dim=1)
    owner_BS = torch.cat([torch.full((len(images), prefix), PREFIX, device=device), owner_BS], dim=1)
    places_BS = torch.cat([torch.arange(prefix, device=device).expand(len(images), -1), places_BS], dim=1)
    hidden_BSD = backbone.decoder.model(
        inputs_embeds=x_BSD, attention_mask=_mask(owner_BS, x_BSD.dtype), position_ids=places_BS, use_cache=False
    ).last_hidden_state
    return backbone.model.lm_head(hidden_BSD[:, prefix:][asked_BS.bool()]).float()


def _lay_out(
    backbone: Backbone, questions: Sequence[str], answers: Sequence[list[int]], prefix: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Of the places after the prefix: ids, rotary positions, question numbers, and whether the next token is asked."""
    ids: list[int] = []
    places: list[int] = []
    owner: list[int] = []
    asked: list[int] = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        own = [*backbone.prompt_ids(question)[1], *answer]
        ids += own
        places += range(prefix, prefix + len(own))
        owner += [number] * len(own)
        asked += [0] * (len(own) - len(answer) - 1) + [1] * (len(answer) + 1)
    return ids, places, owner, asked


def _mask(owner_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (B, 1, S, S): a place sees the prefix and its own question, up to itself."""
    seen = (owner_BS[:, None] == PREFIX) | (owner_BS[:, None] == owner_BS[..., None])
    seen = seen.tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
