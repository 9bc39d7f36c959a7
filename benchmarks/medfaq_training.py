"""A retriever from random weights, trained on medical questions: what it gains, alone and beside lexical search.

    python -m benchmarks.medfaq_training               # the run that is kept; about 13 minutes on two fast cores
    python -m benchmarks.medfaq_training --judge dev   # to choose settings: never sees the test part

BERT-mini, with two of its layers (of 256), starts from random weights. The 5,794 answers of `medfaq_train` are split by
passage: the questions of 80 % are for training, a tenth of which are the dev part that picks the checkpoint and the
weight of the dense leg; the questions of the other 20 % are the test. Every question is searched for among all 5,794
answers. Texts of test passages are never trained on.

Each training passage answers three queries: its question, the patient's own longer description, and a span of itself.
Every copy of a row has other characters left out, on average three tenths of its query and half of its passage.
Passages of the same answer are never negatives of each other (`mask_same_document`).

It is trained in two stages, as deep models are stacked from shallow ones (Gong et al. 2019, "Efficient Training of BERT
by Progressively Stacking"): first the embeddings alone, of which a text's vector is the mean, at thousands of rows a
second; then all of it, two random layers over those embeddings. The start that counts is the model of two layers
with all weights random.

What decides, as found without the test part: on 1,512 questions, dev and a quarter of the training passages that were
then not trained on; recall@10 of BM25 over single characters there is .249, of the plain cosine of their counts .125.

| embeddings alone | rows | recall@10 |
| --- | --- | --- |
| batch 256, temperature .03, a tenth and three tenths left out | 250,000 | .218 |
| three tenths and half left out | 250,000 | .234 |
| the same | 1,000,000 | .243 |
| batch 512 | 1,000,000 | .249 |
| batch 1,024, twice the rate | 1,000,000 | .251 |
| temperature .02, .014 | 1,000,000 | .262, .264 |
| temperature .014, half that rate | 2,000,000 | .265 |
| mined negatives at batch 256, half a million rows | 500,000 | .241 |

What is left out keeps the model from knowing passages by heart: with little of it the loss of the training rows falls
to .002. Layers over the embeddings add little with so few texts: at temperature .03, in batches of 256 at rates from
1e-4 to 1e-3 and of 1,024 at 2e-4 with dropout, also with embeddings that hardly move, recall fell by .004 to .02; at
temperature .014, in batches of 1,024 at 1e-4, it rose from .263 to .268 in mid-run, at 3e-5 it stayed. The second stage
is short, and the checkpoint of it that does best on dev is taken, which may be its start.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, Report
from benchmarks.material import DATA
from benchmarks.random_models import build_bert
from chains.metrics import paired_interval
from finetune.data.rows import RetrievalRow
from finetune.evaluation import (
    Embedded,
    Passage,
    RetrievalSet,
    Scores,
    embed_set,
    evaluate_embeddings,
    score_rankings,
    score_vectors,
)
from finetune.training_loop import TrainingResult

STEM = "medfaq_train"
MAX_TOKENS = 224  # the longest answers have 219 characters
TEST_SHARE, DEV_SHARE = 0.2, 0.1
DENSE_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5)
SEED = 1
GAIN_BAR, MINUTES_BAR = 3.0, 40.0
METRIC = "recall@10"
# Chosen without the test part, see above. Every stage has rows of its own and settings of a training.
_BOTH: dict[str, Any] = {
    "queries": ["question", "detail", "span"],
    "left_out": [0.3, 0.5],
    "batch_size": 1_024,
    "temperature": 0.014,
    "dropout": 0.0,
    "weight_decay": 0.01,
    "graph_tokens": 200_000,
}
STAGES: dict[str, dict[str, Any]] = {
    "words": {**_BOTH, "layers": 0, "copies": 40, "epochs": 3, "learning_rate": 1e-3, "micro_batch_tokens": 16_384},
    "layers": {**_BOTH, "layers": 2, "copies": 5, "epochs": 1, "learning_rate": 1e-4},
}
_ROWS = ("queries", "copies", "left_out")  # settings of the rows, not of the training
_SPAN = (0.05, 0.3)  # of a passage


@dataclass(frozen=True)
class Split:
    """The questions by part, by their passages."""

    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    test: list[dict[str, Any]]
    passages: dict[str, str]


def split() -> Split:
    """The three parts; no passage has questions in two of them."""
    questions, passages = _lines(STEM), {row["id"]: row["text"] for row in _lines(f"{STEM}_passages")}
    ids = sorted(passages)
    random.Random(SEED).shuffle(ids)
    test = set(ids[: round(TEST_SHARE * len(ids))])
    training = ids[len(test) :]
    dev = set(training[: round(DEV_SHARE * len(training))])
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for row in questions:
        passage = row["context_id"]
        parts["test" if passage in test else "dev" if passage in dev else "train"].append(row)
    return Split(parts["train"], parts["dev"], parts["test"], passages)


def training_rows(
    questions: Sequence[Mapping[str, Any]],
    passages: Mapping[str, str],
    *,
    queries: Sequence[str],
    copies: int,
    left_out: tuple[float, float],
) -> list[RetrievalRow]:
    """Rows without mined negatives: the others of the batch are enough.

    Args:
        questions: of the training part.
        passages: text by id.
        queries: which to make a row of: "question", "detail" (the patient's description), "span" (of the passage).
        copies: of every row, each with other characters left out and another span.
        left_out: share of the characters of the query, and of the passage, on average.
    """
    draw = random.Random(SEED)
    rows = []
    for _ in range(copies):
        for number, row in enumerate(questions):
            text = passages[row["context_id"]]
            asked = {"question": row["question"], "detail": row.get("detail"), "span": span(text, draw)}
            for query in (asked[name] for name in queries if asked[name]):
                thinned = thin(query, left_out[0], draw), thin(text, left_out[1], draw)
                rows.append(_row(*thinned, row["context_id"], number))
    return rows


def span(text: str, draw: random.Random) -> str:
    """A part of a text at random (cropping as in Contriever, Izacard et al. 2021)."""
    length = max(3, int(len(text) * draw.uniform(*_SPAN)))
    start = draw.randrange(max(1, len(text) - length + 1))
    return text[start : start + length]


def thin(text: str, share: float, draw: random.Random) -> str:
    """The text without some of its characters: none to twice the share, the share on average; never all of them."""
    left_out = draw.uniform(0, 2 * share)
    return "".join(character for character in text if draw.random() >= left_out) or text


def _row(query: str, positive: str, passage: str, number: int) -> RetrievalRow:
    return RetrievalRow(query, (positive,), pos_docs=(passage,), file=STEM, line=number)


def questions_over_pool(name: str, questions: Sequence[Mapping[str, Any]], passages: Mapping[str, str]) -> RetrievalSet:
    """Questions that are searched for among all passages."""
    pool = tuple(Passage(identifier, text) for identifier, text in sorted(passages.items()))
    gold = tuple((row["context_id"],) for row in questions)
    return RetrievalSet(name, tuple(row["question"] for row in questions), gold, pool)


def fused_scores(vectors: Embedded, questions: RetrievalSet, weights: Sequence[float]) -> dict[str, Scores]:
    """Scores of BM25 ("lexical") and of the project's own hybrid retriever at each weight of its dense leg."""
    from benchmarks.training_store import open_store
    from chains.retrievers import HybridRetriever, LexicalRetriever

    found = {}
    with open_store(questions.passages, vectors.passages) as (store, fulltext):
        retrievers: dict[str, Any] = {"lexical": LexicalRetriever(store=store, fulltext=fulltext)}
        for weight in weights:
            retrievers[f"{weight:g}"] = HybridRetriever(store=store, fulltext=fulltext, dense_weight=weight)
        for name, retriever in retrievers.items():
            rankings = [
                [chunk for chunk, _ in retriever.rank(question, 10, vector=vector)]
                for question, vector in zip(questions.questions, vectors.queries, strict=True)
            ]
            chunks = store.knowledge_base.chunks(chunk for ranking in rankings for chunk in ranking)
            found[name] = score_rankings([[chunks[chunk].key for chunk in ranking] for ranking in rankings], questions)
    return found


def main() -> None:
    """Train, judge, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", choices=["test", "dev"], default="test", help="the part that is judged on")
    parser.add_argument("--pool", type=int, default=None, help="passages searched, for trials; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("settings", nargs="*", help="STAGE.KEY=VALUE in place of STAGES")
    options = parser.parse_args()
    stages = {name: dict(settings) for name, settings in STAGES.items()}
    for item in options.settings:
        key, _, value = item.partition("=")
        stage, _, name = key.partition(".")
        stages[stage][name] = json.loads(value)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import torch

    torch.set_num_threads(options.threads)
    shown = {"judge": options.judge, "pool": options.pool, "threads": options.threads, **stages}
    with tempfile.TemporaryDirectory() as scratch, Report("medfaq_training", shown, options.results) as report:
        run(report, Path(scratch), stages, options.judge, options.pool)


def run(report: Report, scratch: Path, stages: Mapping[str, Any], judge: str, pool: int | None) -> None:
    """One training and what came of it."""
    started = time.perf_counter()
    parts = split()
    dev = questions_over_pool("dev", parts.dev, parts.passages)
    judged = questions_over_pool(judge, getattr(parts, judge), parts.passages)
    if pool is not None:
        dev, judged = (
            found.sampled(max_questions=len(found.questions), max_passages=pool, seed=SEED) for found in (dev, judged)
        )
    start = stacked(scratch / "start", layers=stages["layers"]["layers"])
    results, candidate = [], None
    for name, settings in stages.items():
        base = stacked(scratch / name / "base", layers=settings["layers"], words=candidate)
        rows = training_rows(parts.train, parts.passages, **{key: settings[key] for key in _ROWS})
        results.append(train_stage(report, name, base, rows, settings, during=dev))
        candidate = results[-1].candidate
    assert candidate is not None
    minutes = judge_models(report, start, candidate, judged, dev, started)
    if judge == "test":
        report.bar("whole run", minutes, MINUTES_BAR, "min")
    moment = report.machine["date"][:16].replace(":", "")  # 2026-11-28T0058
    draw_curves(report.folder / f"medfaq_training-{moment}.png", results)


def stacked(target: Path, *, layers: int, words: Path | None = None) -> Path:
    """Write a BERT-mini of so many layers with random weights, or over the embeddings of another model.

    New layers over embeddings that have learnt begin by adding nothing to what passes through them, so that nothing is
    lost (Chen et al. 2016, "Net2Net"): the matrix that ends each of their two halves is zero, all others are random.
    """
    from safetensors.torch import load_file, save_file

    build_bert(target, "mini", max_tokens=MAX_TOKENS, layers=layers, pooling="mean")
    if words is not None:
        file = target / "model.safetensors"
        learnt = load_file(words / "model.safetensors")
        weights = load_file(file) | {name: learnt[name] for name in learnt if name.startswith("embeddings.")}
        for name in weights:
            if name.endswith(".output.dense.weight"):
                weights[name].zero_()
        save_file(weights, file, metadata={"format": "pt"})
    return target


def train_stage(
    report: Report,
    name: str,
    base: Path,
    rows: Sequence[RetrievalRow],
    settings: Mapping[str, Any],
    *,
    during: RetrievalSet,
) -> TrainingResult:
    """The trainer's own run, judged at intervals on a set."""
    from finetune.bge.config import BgeTrainingConfig
    from finetune.bge.train import train

    config = BgeTrainingConfig(
        model=str(base),
        output=base.parent / "run",
        train=[Path(STEM)],
        group_size=1,
        query_max_tokens=96,
        passage_max_tokens=MAX_TOKENS,
        device="cpu",
        **{key: value for key, value in settings.items() if key not in ("layers", *_ROWS)},
    )
    result = train(config, rows, evaluate=lambda found: evaluate_embeddings(found, during).mean(METRIC))
    report.add(
        "training",
        stage=name,
        rows=len(rows),
        steps=result.steps,
        rows_per_s=result.rows_per_s,
        minutes=result.seconds / 60,
        best_step=result.best_step or 0,
        loss_first=result.losses[0],
        loss_last=result.losses[-1],
        dev_first=result.scores[0][1],
        dev_best=max(score for _, score in result.scores),
    )
    return result


def judge_models(
    report: Report, start: Path, candidate: Path, judged: RetrievalSet, dev: RetrievalSet, started: float
) -> float:
    """Figures before and after, alone and fused with BM25; returns the minutes since `started`."""
    from chains.bge.embeddings import BGEEmbeddings

    before = score_vectors(embed_set(BGEEmbeddings(model=start, engine="torch"), judged), judged)
    tuned = BGEEmbeddings(model=candidate, engine="torch")
    vectors = embed_set(tuned, judged)
    after = score_vectors(vectors, judged)
    # the weight of the dense leg is a setting: chosen on dev, where the test set must not choose it
    chosen = fused_scores(_with_questions(vectors, tuned, dev), dev, DENSE_WEIGHTS)
    weight = max(DENSE_WEIGHTS, key=lambda value: chosen[f"{value:g}"].mean(METRIC))
    fused = fused_scores(vectors, judged, [weight])
    for name, scores in {"random weights": before, "trained": after, "BM25": fused["lexical"],
                         f"BM25 + trained, dense weight {weight:g}": fused[f"{weight:g}"]}.items():  # fmt: skip
        report.add(
            f"{judged.name}: {scores.questions} questions, {scores.passages} passages", who=name, **scores.means()
        )
    compare(report, "trained against random weights", before, after)
    gain = compare(report, "fused against BM25", fused["lexical"], fused[f"{weight:g}"])
    minutes = (time.perf_counter() - started) / 60
    if judged.name == "test":
        ratio = after.mean(METRIC) / max(before.mean(METRIC), 1e-9)
        report.bar(f"{METRIC} over its start", ratio, GAIN_BAR, "x", at_least=True)
        report.bar(f"{METRIC} fused over BM25", gain, 0.0, "", at_least=True)
    return minutes


def _with_questions(vectors: Embedded, embeddings: Any, questions: RetrievalSet) -> Embedded:
    """The same passages with the questions of another set."""
    return replace(vectors, queries=embeddings.embed_queries_array(questions.questions))


def compare(report: Report, what: str, before: Scores, after: Scores) -> float:
    """The mean difference of recall@10 with its 95 % paired bootstrap interval, as a row; returns the mean."""
    found = paired_interval(before.by_metric[METRIC], after.by_metric[METRIC], seed=SEED)
    interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
    report.add("differences", what=what, metric=METRIC, mean=found.mean, interval_95=interval)
    return found.mean


def draw_curves(path: Path, results: Sequence[TrainingResult]) -> None:
    """The loss of every step and the dev score of every evaluation, one stage after the other, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    behind = 0
    for result, name in zip(results, STAGES, strict=True):
        left.plot(range(behind + 1, behind + 1 + len(result.losses)), result.losses, linewidth=0.8, label=name)
        right.plot([behind + step for step, _ in result.scores], [score for _, score in result.scores], "o-")
        behind += result.steps
    left.set(title="training loss", xlabel="step")
    left.legend()
    right.set(title=f"dev {METRIC}", xlabel="step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _lines(stem: str) -> list[dict[str, Any]]:
    with (DATA / f"{stem}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
