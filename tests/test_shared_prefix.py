"""Several questions in one sequence give what they give alone."""

import pytest
import torch

from maskgym.backbones.shared_prefix import answer_logits, can_share
from tests.conftest import build_of
from tests.families import BUILDERS


def test_questions_about_one_image_do_not_see_each_other(small, source):
    images = small.encode_images([source[0].image, source[2].image])
    questions = [["what color is the shape?", "is there a red circle in the image?", "what color?"], ["is there?"]]
    answers = [[small.answer_ids("red"), small.answer_ids("yes no"), []], [small.answer_ids("blue")]]
    with torch.no_grad():
        together = answer_logits(small, images, questions, answers)
        alone = []
        for image, asked, given in zip(images, questions, answers, strict=True):
            for question, ids in zip(asked, given, strict=True):
                for place in range(len(ids) + 1):
                    encoding = small.assemble([image], [question], continuations=[ids[:place]])
                    alone.append(small.prefill(encoding, small.full(encoding))[0])
    assert together.shape == (8, small.decoder.shape.vocab)
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-3, "the questions must matter"


@pytest.mark.parametrize("name", BUILDERS)
def test_only_families_with_nothing_but_visual_tokens_share(name):
    assert can_share(build_of(name)) == (name == "llava")
