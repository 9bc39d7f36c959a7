"""Fit and judge the relevance of chains/calibration.py: the probability that a hit answers its question.

    python -m benchmarks.fit_relevance            # fit, print both tables of weights, judge them
    python -m benchmarks.fit_relevance --judge    # judge the shipped weights

A hit answers when it belongs to the question's passage. Two kinds of questions have none: *near* ones are asked after
the hits of their own passage (and any that quote its answer) were taken away, so that the nearest misses remain; *far*
ones are asked of another knowledge base. Near ones come from cmrc2018 only: elsewhere a passage that nobody marked may
answer all the same. Only the first hit counts.

Fitted on cmrc2018_train_substitute, cmrc2018_trial, dureader2_demo_train and medfaq_train; the other sets only judge.
The nearness of a passage is fitted with the lexical embedder, whose cosines are no more than one example of a scale:
it is turned into standard deviations before it counts.

2026-11-22, 400 questions of a set at most. Of first hits of the two sets that were not fitted, with a relevance of
0-.2 / -.4 / -.6 / -.8 / -1, these shares answer: .02 / .23 / .44 / .80 / .98. Refusing below .2, the default, refuses

| set | wrongly | near misses | unrelated questions |
|---|---|---|---|
| cmrc2018_trial | .005 | .497 | .877 |
| cmrc2018_train_substitute | .005 | .522 | .895 |
| dureader2_demo_train | .000 | | .708 |
| medfaq_train | .030 | | .632 |
| cmrc2018_devtest | .003 | .468 | .885 |
| dureader2_demo_dev | .000 | | .720 |

The default is no higher because users' questions share fewer words with their passages than those of the sets: of the
manual's questions in tests/test_manual.py some that are answered reach only .24.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from benchmarks.retrieval_quality import POOLS, SETS, Pool, open_pool
from chains import calibration
from chains.calibration import MENTION_WEIGHTS
from chains.evaluation import Question, read_questions
from chains.metrics import refusal_scores

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TOP_K = 5
FITTED = {"cmrc2018_train_substitute": 1.0, "cmrc2018_trial": 0.7, "dureader2_demo_train": 0.3, "medfaq_train": 0.5}
SHARES = {"near": 2 / 3, "far": 1 / 3}
# Questions with an answer for each without. Those of the sets were written by people who saw the passage, and share
# more words with it than users' do: better to take most for answerable. Where only nearness speaks, nothing is known.
ODDS = {"mentions": 5.0, "nearness": 1.0}
THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)

Floats = NDArray[np.float64]
Features = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """A question's hits, best first: features of each, and whether it belongs to the question's passage."""

    mentions: list[Features]
    nearness: list[Features]
    answers: list[bool]


def ask(pool: Pool, question: Question, *, without_gold: bool) -> Asked:
    """The first hits of a question in a pool."""
    gold = set(question.gold)
    vector = pool.store.embed_query(question.question)
    ranking = pool.hybrid.rank(question.question, 60, vector=vector)
    chunks = pool.store.knowledge_base.chunks(i for i, _ in ranking)
    own = {i: bool(gold & pool.passages[i]) for i, _ in ranking}
    kept = [i for i, _ in ranking if not (without_gold and (own[i] or quotes(chunks[i].text, question.answers)))]
    hits = kept[:TOP_K]
    cosines = [float(pool.vectors[i] @ vector) for i in hits]
    return Asked(
        [calibration.mention_features(question.question, chunks[i].document()) for i in hits],
        [{"excess": above} for above in calibration.excess(cosines, pool.sample @ vector, len(pool.vectors))],
        [own[i] for i in hits],
    )


def quotes(text: str, answers: Sequence[str]) -> bool:
    """Whether a text holds an answer that is long enough not to stand there by chance."""
    return any(len(answer) > 3 and answer in text for answer in answers)


def examples(asked: Mapping[tuple[str, str], list[Asked]], kind: str) -> Iterator[tuple[Features, bool, float]]:
    """(features, whether it answers, weight) of the first hits; beside the right passage nobody has said."""
    for (name, case), items in asked.items():
        weight = FITTED.get(name, 0.0) * SHARES.get(case, ODDS[kind]) / max(len(items), 1)
        for item in items if weight else ():
            features = item.mentions if kind == "mentions" else item.nearness
            if features and (case != "with" or item.answers[0]):
                yield features[0], item.answers[0], weight


def fit(rows: Sequence[tuple[Features, bool, float]]) -> dict[str, float]:
    """Weights of the logistic regression, by Newton's method, with a breath of L2."""
    names = ["constant", *rows[0][0]]
    values = np.array([[1.0, *features.values()] for features, _, _ in rows])
    answers = np.array([answer for _, answer, _ in rows], np.float64)
    weight = np.array([w for *_, w in rows])
    found = np.zeros(values.shape[1])
    for _ in range(40):
        chance = 1 / (1 + np.exp(-values @ found))
        gradient = values.T @ (weight * (chance - answers)) + 1e-5 * found
        curvature = (values * (weight * chance * (1 - chance))[:, None]).T @ values + 1e-5 * np.eye(len(names))
        found -= np.linalg.solve(curvature, gradient)
    return dict(zip(names, found.tolist(), strict=True))


def best(features: Sequence[Features], weights: Mapping[str, float]) -> float:
    """The relevance of the best hit, by which a question is refused."""
    return max((calibration.logistic(weights, each) for each in features), default=0.0)


def judge(asked: Mapping[tuple[str, str], list[Asked]], mentions: Mapping[str, float]) -> None:
    """Print what refusing below a threshold does, for each set."""
    print(
        "| set | refuse below | wrongly refused | near: precision, recall | far: precision, recall |\n"
        + "|---" * 5
        + "|"
    )
    for name in SETS:
        scores = {
            case: np.array([best(item.mentions, mentions) for item in asked[name, case]]) for case in ("with", *SHARES)
        }  # fmt: skip
        for threshold in THRESHOLDS:
            wrongly = scores["with"] < threshold
            parts = []
            for case in ("near", "far"):
                known = [True] * len(wrongly) + [False] * len(scores[case])
                result = refusal_scores([*wrongly, *(scores[case] < threshold)], known)
                parts.append(f"{result.precision:.3f}, {result.recall:.3f}" if len(scores[case]) else "-")
            print(f"| {name} | {threshold} | {wrongly.mean():.3f} | {' | '.join(parts)} |")


def reliability(asked: Mapping[tuple[str, str], list[Asked]], mentions: Mapping[str, float]) -> None:
    """Print, for hits of the sets that were not fitted, how many of those given a probability answer."""
    judged = {key: items for key, items in asked.items() if key[0] not in FITTED}
    pairs = []
    for (_, case), items in judged.items():
        for item in items:
            pairs += [
                (calibration.logistic(mentions, features), answers, SHARES.get(case, ODDS["mentions"]))
                for features, answers in zip(item.mentions[:1], item.answers[:1], strict=True)
                if case != "with" or answers
            ]
    print("| relevance | hits | answer |\n|---|---|---|")
    for low in np.arange(0, 1, 0.2):
        inside = [(answers, weight) for score, answers, weight in pairs if low <= score < low + 0.2]
        share = sum(a * w for a, w in inside) / max(sum(w for _, w in inside), 1e-9)
        print(f"| {low:.1f}-{low + 0.2:.1f} | {len(inside)} | {share:.2f} |")


def main() -> None:
    """Fit unless told only to judge, print the weights, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true", help="keep the shipped weights")
    parser.add_argument("--questions", type=int, default=400, help="of each set, at most")
    parser.add_argument("--work", type=Path, help="keep the knowledge bases here")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        pools = {name: open_pool(name, options.work or Path(temporary)) for name in POOLS}
        asked: dict[tuple[str, str], list[Asked]] = {}
        for name, home in SETS.items():
            rows = [row for row in read_questions(DATA / f"{name}.jsonl") if row.gold and row.question.strip()]
            chosen = random.Random(0).sample(rows, min(options.questions, len(rows)))
            others = [pool for key, pool in pools.items() if key != home]
            asked[name, "with"] = [ask(pools[home], row, without_gold=False) for row in chosen]
            asked[name, "near"] = [ask(pools[home], row, without_gold=True) for row in chosen if home == "cmrc2018"]
            asked[name, "far"] = [
                ask(others[n % len(others)], row, without_gold=False) for n, row in enumerate(chosen)
            ]  # fmt: skip
            print(f"{name}: {len(chosen)} questions", flush=True)
        mentions = dict(MENTION_WEIGHTS)
        if not options.judge:
            mentions = fit(list(examples(asked, "mentions")))
            print("MENTION_WEIGHTS", {name: round(value, 2) for name, value in mentions.items()})
            nearness = fit(list(examples(asked, "nearness")))
            print("NEARNESS_WEIGHTS", {name: round(value, 2) for name, value in nearness.items()})
        judge(asked, mentions)
        reliability(asked, mentions)


if __name__ == "__main__":
    main()
