"""The page itself; Streamlit runs it, from top to bottom, whenever something on it changes."""

from __future__ import annotations

import re
from pathlib import Path

import streamlit as st

from maskgym.backbones.encodings.encoding import Query
from maskgym.common.errors import InputError
from maskgym.envs.data.scoring import score
from maskgym.eval.demo.command import Served
from maskgym.eval.demo.comparison import FULL, Side
from maskgym.eval.demo.uploads import uploaded_query
from maskgym.policies.planner import Planner

KINDS = ["png", "jpg", "jpeg", "webp", "bmp", "gif"]


def show(served: Served) -> None:
    """Inputs on the left; the full model, the policy and a baseline side by side on the right."""
    comparison = served.comparison
    st.set_page_config(page_title="maskgym", layout="wide")
    backbone = Path(comparison.backbone.name).name  # visitors need not know where it lies
    st.subheader(f"What {_plain(comparison.policy.name)} computes of {_plain(backbone)}")
    inputs, *columns = st.columns([1.25, 1, 1, 1], gap="medium")
    with inputs:
        query = _choose_query(served)
        percent = st.slider("Budget (% of the full plan's LLM FLOPs)", 1, 100, 50, format="%d %%")
        names = list(comparison.baselines)
        baseline = comparison.baselines[st.selectbox("Baseline", names, index=names.index("random"))]
    if query is None:
        return
    planners: list[Planner] = [comparison.full, comparison.policy, baseline]
    for column, planner in zip(columns, planners, strict=True):
        with column:
            st.markdown(f"**{'full model' if planner.name == FULL else _plain(planner.name)}**")
            try:
                _show_side(comparison.side(planner, query, percent / 100), query)
            except InputError as error:
                st.error(_plain(str(error)))


def _choose_query(served: Served) -> Query | None:
    """What the visitor asks; None while that is not complete, or cannot be used, which is then said."""
    limits = served.limits
    upload = st.file_uploader("Upload an image", KINDS, max_upload_size=limits.upload_megabytes)
    if upload is None:
        number = st.selectbox(
            "or pick one", range(len(served.queries)), format_func=lambda row: _label(served.queries[row])
        )
        picked = served.queries[number]
        question = st.text_input("Question", picked.question, key=f"question {number}")
        if question == picked.question:
            return picked
        query = Query(picked.id, picked.image, question, image_key=picked.image_key)
    else:
        question = st.text_input("Question", placeholder="what is in the image?", key=f"question {upload.file_id}")
        try:
            query = uploaded_query(
                upload.getvalue(), upload.name, question, limits.upload_megabytes, limits.upload_megapixels
            )
        except InputError as error:
            st.error(_plain(str(error)))
            return None
    if not question.strip():
        st.info("Ask something about the image.")
        return None
    return query


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no links, pictures or HTML of whoever wrote it, on one line."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def _label(query: Query) -> str:
    return f"{query.id}: {query.question}"


def _show_side(side: Side, query: Query) -> None:
    reply = side.reply
    right = bool(query.answers) and score(reply.text, query.answers) > 0.5
    mark = "" if not query.answers else " :green[✓]" if right else " :red[✗]"
    st.markdown(f"### {_plain(reply.text) or '(nothing)'}{mark}")
    layers, heads = reply.plan.heads.shape[1:]
    kept = f"{reply.kept_tokens:.4g} of {side.visual_tokens} visual tokens"
    st.image(side.picture, width="stretch", alt=f"{kept} kept, the rest dark; heads by layers below")
    st.markdown(
        f"{kept}  \n{reply.kept_heads} of {layers * heads} head slots, {reply.kept_layers} of {layers} layers  \n"
        f"**{reply.llm_flops_ratio:.1%}** of the LLM FLOPs: {reply.llm_flops / 1e9:.3g} G  \n"
        f"**{side.ttft_ms:.3g} ms** to the first token"
    )


if __name__ == "__main__":
    assert Served.now is not None, "start the page with python -m maskgym.eval demo"
    show(Served.now)
