"""A second look at the best candidates: what BM25 and hashed vectors cannot count, read from title and text."""

from __future__ import annotations

from collections.abc import Iterable

from chains.analysis import fold, fold_all, is_cjk
from chains.clause_scores import read_question
from chains.extraction import share_found
from chains.knowledge_base import StoredChunk
from loaders.splitters import text_with_context

# What each adds to a lexical score of which the best is 1. By a conditional logit over the first 30 candidates of
# cmrc2018_trial, cmrc2018_train_substitute, dureader2_demo_train and medfaq_train, rounded; recall is flat around them.
WEIGHTS = {
    "mentioned": 0.8,  # share of the question's information, in characters and words, that stands in the chunk
    "title": 0.6,  # the question names the document's title
    "opening": 0.05,  # the chunk opens its document, which says there what it is about
}


def closeness(question: str, chunks: Iterable[StoredChunk]) -> dict[int, float]:
    """What each chunk's lexical score is raised by, by chunk id; 0.0 to the sum of the weights."""
    asked = read_question(question)
    folded = fold(question)
    telling = asked.characters | {term: bits for term, bits in asked.pairs.items() if not is_cjk(term[0])}
    looked_at = list(chunks)
    titles = fold_all([chunk.title.strip() for chunk in looked_at])
    texts = fold_all([text_with_context(chunk.text, chunk.metadata) for chunk in looked_at])
    return {
        chunk.id: WEIGHTS["mentioned"] * share_found(telling, text)
        + WEIGHTS["title"] * (len(title) > 1 and title in folded)
        + WEIGHTS["opening"] * (chunk.start == 0)
        for chunk, title, text in zip(looked_at, titles, texts, strict=True)
    }
