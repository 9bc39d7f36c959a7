"""What a run writes down, against values counted by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.doctor import Finding
from finetune.evaluation import METRICS, FusedScores, Scores
from finetune.gate import GateConfig, decide
from finetune.report import (
    Blend,
    DataFile,
    FusedReport,
    RunReport,
    SetReport,
    curves,
    file_of,
    page,
    read_manifest,
    thinned,
    write_report,
)


def scores(right: int) -> Scores:
    """So many of a hundred questions right, by every metric."""
    return Scores(dict.fromkeys(METRICS, (1.0,) * right + (0.0,) * (100 - right)), passages=500)


def report(**changes: object) -> RunReport:
    values = {"dev": scores(60).by_metric["ndcg@10"]}
    fields: dict[str, object] = {
        "kind": "bge",
        "method": "lora",
        "base": "models/base",
        "base_digest": "abc",
        "digest": "def",
        "verdict": decide({"dev": scores(40).by_metric["ndcg@10"]}, values, GateConfig(), metric="ndcg@10"),
        "metric": "ndcg@10",
        "sets": {"dev": SetReport(scores(40), scores(60), sampled=True)},
        "data": [DataFile("train.jsonl", "0" * 64, 7)],
        "settings": {"learning_rate": 2e-5, "query": "中文"},
        "seed": 3,
        "steps": 4,
        "planned_steps": 5,
        "best_step": 2,
        "seconds": 12.34,
        "rows_per_s": 5.678,
        "losses": [2.0, 1.5, 1.0, 0.5],
        "scores": [(0, 0.4), (2, 0.6), (4, 0.5)],
        "findings": [Finding("truncated", "warning", "截断", "cut")],
    }
    return RunReport(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_manifest_holds_before_after_and_difference_with_its_interval(tmp_path: Path) -> None:
    write_report(tmp_path, report(), run={"seed": 3})
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest["promoted"] is True
    found = manifest["metrics"]["dev"]["recall@10"]
    assert (found["before"], found["after"], found["difference"]) == (0.4, 0.6, 0.2)
    # 20 of 100 questions won, none lost: the binomial's 95 % interval is about .2 +- 1.96 x sqrt(.2 x .8 / 100) = .078
    assert found["low"] == pytest.approx(0.12, abs=0.015)
    assert found["high"] == pytest.approx(0.28, abs=0.015)
    assert manifest["metrics"]["dev"]["sampled"] is True
    assert (manifest["base"], manifest["digest"], manifest["seed"]) == (
        {"model": "models/base", "digest": "abc"},
        "def",
        3,
    )
    assert manifest["run"] == {"seed": 3}
    assert manifest["versions"]["numpy"]
    assert manifest["findings"][0]["name"] == "truncated"


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: RunReport) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("finetune.report.page", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, report())
    assert read_manifest(tmp_path) is None
    assert not list(tmp_path.glob(".*"))


def test_a_directory_without_a_manifest_or_with_a_damaged_one_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / "ragproj.json").write_text("{", encoding="utf-8")
    assert read_manifest(tmp_path) is None


def test_the_page_says_the_verdict_first_then_the_figures_in_both_languages() -> None:
    text = page(report())
    assert text.index("通过") < text.index("| dev | ndcg@10 | 0.4000 | 0.6000 | +0.2000 |")
    assert "100 个问题 / questions，500 个片段 / passages，抽样 / sampled" in text
    assert "`truncated`：截断" in text
    assert "best step 2" in text
    assert "中文" in text
    refused = decide({"dev": (0.0,) * 10}, {"dev": (0.0,) * 10}, GateConfig(), metric="ndcg@10")
    assert "未通过" in page(report(verdict=refused))


def test_the_page_compares_the_hybrid_with_lexical_search_and_with_itself_before() -> None:
    fused = FusedReport(FusedScores(scores(50), scores(55)), FusedScores(scores(50), scores(70)))
    text = page(report(fused=fused))
    assert "| dev | ndcg@10 | 0.5000 | 0.7000 | +0.2000 |" in text
    assert "| dev | ndcg@10 | 0.5500 | 0.7000 | +0.1500 |" in text
    manifest = report(fused=fused).as_dict()
    assert manifest["fused"]["against_lexical"]["recall@1"]["difference"] == 0.2
    assert json.dumps(manifest)


def test_the_page_shows_what_shortened_vectors_find() -> None:
    short = report(prefixes={16: SetReport(scores(30), scores(50), sampled=True)})
    text = page(short)
    assert "| dev，16 维 | ndcg@10 | 0.3000 | 0.5000 | +0.2000 |" in text
    found = short.as_dict()["prefixes"]["16"]
    assert (found["recall@1"]["after"], found["questions"], found["sampled"]) == (0.5, 100, True)
    assert report().as_dict()["prefixes"] is None
    assert "截短" not in page(report())


def test_a_reranker_is_compared_with_the_order_its_candidates_were_found_in() -> None:
    found = report(kind="reranker", found={"dev": scores(45)})
    assert "| dev | ndcg@10 | 0.4500 | 0.6000 | +0.1500 |" in page(found)
    assert found.as_dict()["against_found"]["dev"]["recall@1"]["difference"] == 0.15
    assert report().as_dict()["against_found"] is None


def test_the_page_lists_the_mixtures_that_were_tried() -> None:
    text = page(report(blend=Blend(((0.8, 0.55, False), (0.6, 0.52, True)), 0.6)))
    assert "采用 / taken：0.6" in text
    assert "| 0.8 | 0.5500 | ✗ |" in text


def test_the_curves_are_a_picture() -> None:
    with Image.open(io.BytesIO(curves(report()))) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
        assert len(set(picture.convert("RGB").resize((90, 32)).getdata())) > 3  # something is drawn


def test_a_long_curve_is_thinned_to_means() -> None:
    assert thinned([3.0, 1.0]) == [[1, 3.0], [2, 1.0]]
    assert thinned([]) == []
    points = thinned([float(number % 2) for number in range(1001)])  # three steps a point
    assert len(points) == 334
    assert points[0] == [3, pytest.approx(1 / 3, abs=1e-6)]
    assert points[-1] == [1001, 0.5]


def test_a_data_file_is_named_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"abc")
    # sha256 of "abc": FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_of(tmp_path / "rows.jsonl", 1) == DataFile(str(tmp_path / "rows.jsonl"), expected, 1)
