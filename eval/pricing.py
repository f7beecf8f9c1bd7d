"""The option of every command that prices plans: at how many tokens of an answer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Literal

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.expected_length import Expected, check_expected, described
from maskgym.common.errors import InputError
from maskgym.envs.data.answer_length import answer_cut
from maskgym.envs.data.expected_length import mean_length, predicted_length
from maskgym.envs.data.queries import DatasetQueries, load_queries
from maskgym.eval.policies import expectation_of


@dataclasses.dataclass(kw_only=True)
class Pricing:
    """Options of prices."""

    answer_tokens: int | Literal["mean", "predicted"] | None = None
    """Answer length, in tokens, that plans are priced at: a number, the training split's mean, or predicted by each
    question's words. By default as the controller was trained; else 1 where all answers have one token, predicted where
    they have more."""

    def check_price(self) -> None:
        """Refuse a length that is none.

        Raises:
            InputError: naming it.
        """
        if isinstance(self.answer_tokens, int) and self.answer_tokens < 1:
            raise InputError(
                f"--answer-tokens is {self.answer_tokens}; give a number of tokens, at least 1, or mean, or predicted"
            )

    def price(
        self,
        backbone: Backbone,
        data: str,
        source: DatasetQueries,
        policies: Sequence[str] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        """Have the backbone expect answers of the length that was asked for, and say so where it is not one token.

        Args:
            backbone: prices plans.
            data: what the training split is of.
            source: queries of it, to be answered.
            policies: whose controllers have their own length, as the command line has them.
            max_new_tokens: where answers are cut, if not by default.

        Raises:
            InputError: a training split is asked for that cannot be used, or controllers were trained at different
                lengths.
        """
        expected, why = self._expected(backbone, data, source, policies, max_new_tokens)
        backbone.expected_answer_tokens = check_expected(expected)
        if expected != 1:
            print(f"plans are priced at {described(expected)} an answer ({why})", file=sys.stderr)

    def _expected(
        self,
        backbone: Backbone,
        data: str,
        source: DatasetQueries,
        policies: Sequence[str],
        max_new_tokens: int | None,
    ) -> tuple[Expected, str]:
        """What is expected, and why."""
        if isinstance(self.answer_tokens, int):
            return self.answer_tokens, "as asked for"
        if self.answer_tokens is None:
            trained = expectation_of(policies)
            if trained is not None:
                return trained, "as the controller was trained"
            if answer_cut(backbone, source, max_new_tokens) == 1:
                return 1, "the first token is the answer"
        try:
            train = load_queries(data, "train")
            if self.answer_tokens == "mean":
                return mean_length(backbone, train, max_new_tokens), f"the mean of {data} train"
            return predicted_length(backbone, train, max_new_tokens), f"expected of each question by {data} train"
        except InputError as error:
            if self.answer_tokens is not None:
                raise
            print(f"plans are priced at 1 token an answer: no longer one can be expected ({error})", file=sys.stderr)
            return 1, "nothing else is known"
