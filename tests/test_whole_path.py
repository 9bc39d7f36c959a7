"""The manual's page of the whole path, run from top to bottom with tiny models: from raw questions to the web page."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `bge_models` and `chatglm3_models`

from bge_models import build_bert
from chatglm3_models import build_original

from chains import load_config
from finetune.bge.config import BgeTrainingConfig
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from ui.cli import main

pytest.importorskip("torch", reason="needs the extra [models]")
pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("bitsandbytes", reason="needs the extra [train]")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "whole_path.md"
CONFIG = "chains/configs/bge_chatglm3.yaml"
BGE_CONFIG, CHATGLM3_CONFIG = "finetune/configs/bge_lora.yaml", "finetune/configs/chatglm3_qlora.yaml"
_BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What the page's commands are given besides, for models of 64 numbers and a dozen questions; the rest is as shipped.
# Random weights learn a dozen questions by heart, at rates that would ruin real ones, and nothing that carries over to
# others. So they are judged on what they learn; the doctor, which stops such runs, is told to let them pass.
TINY = {
    "data multi-doc-qa": "dev_share=0.25 references=2 negatives=4",
    "data mine": "",
    "data generation": "dev_share=0.25 references=2 distractors=0 refusal_share=0 empty_share=0",
    "finetune bge": (
        "model=models/bge device=cpu epochs=60 batch_size=16 learning_rate=5e-3 temperature=0.05 dropout=0"
        " lora.dropout=0 passage_max_tokens=128"
        " evaluation.dev.rows=[data/mined.jsonl] evaluation.every_steps=10 evaluation.fused=false"
        " doctor.ignore=[learning_rate,dev_leak]"
    ),
    "finetune chatglm3": (
        "model=models/chatglm3 device=cpu dtype=float32 max_steps=120 batch_size=16 learning_rate=5e-3 lora.dropout=0"
        " max_tokens=512 micro_batch_tokens=2048 gradient_checkpointing=false evaluation.max_new_tokens=24"
        " evaluation.dev=[data/generation/generation_train.jsonl] evaluation.every_steps=60"
        " doctor.ignore=[learning_rate,dev_leak]"
    ),
    "merge": "device=cpu dtype=float32",
}
# Records taken of each file.
RECORDS = 6
SERVED = (
    "splitter.chunk_size=100 embeddings.model=models/bge embeddings.engine=torch llm.model=models/chatglm3"
    " llm.device=cpu llm.dtype=float32 llm.max_new_tokens=24 min_relevance=0"
)
RULE = "采购申请由部门经理审批。"


@dataclass(frozen=True)
class Step:
    """A command of the page, and what it left behind."""

    words: list[str]
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its one JSON object."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Walk:
    """The folder that the page's commands were run in."""

    folder: Path
    steps: list[Step]
    serve: list[str]
    """the words of `ragproj serve`, which does not end by itself"""


def verb_of(words: list[str]) -> str:
    return " ".join(words[: 2 if words[0] in {"data", "finetune"} else 1])


def commands() -> Iterator[list[str]]:
    """The page's commands in order, with what makes them tiny."""
    for block in _BASH.findall(PAGE.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if line.startswith("ragproj "):
                words = shlex.split(line)[1:]
                yield [*words, *TINY.get(verb_of(words), SERVED).split()]


def ragproj(*words: str) -> Step:
    """The command in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main(words)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    return Step(list(words), status, out.getvalue(), err.getvalue())


def prepare(folder: Path, shared: Path) -> None:
    """What the page takes for granted: its configs, models, raw questions, and documents to ask."""
    for packaged in ("chains/configs", "finetune/configs"):
        shutil.copytree(ROOT / packaged, folder / packaged)
    for layout in ("raw", "old"):  # both layouts of documents; of their domains the one with the shortest answers
        (folder / "raw" / layout).mkdir(parents=True)
        with (shared / "multidoc_shape" / layout / "百科-001.json").open(encoding="utf-8") as lines:
            records = "".join(itertools.islice(lines, RECORDS))
        (folder / "raw" / layout / "百科-001.json").write_text(records, encoding="utf-8")
    layout = shared / "assets" / "bge-small-zh-v1.5_layout"
    build_bert(folder / "models" / "bge", layout=layout, layers=1, positions=128)
    build_original(folder / "models" / "chatglm3", texts_in(folder / "raw"))
    (folder / "my_documents").mkdir()
    (folder / "my_documents" / "采购制度.txt").write_text(RULE, encoding="utf-8")


def texts_in(folder: Path) -> Iterator[str]:
    """Questions, answers and the texts that hold them."""
    for path in sorted(folder.rglob("*.json")):
        with path.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                yield from (text for pair in record["QA"] for text in (pair["question"], pair["answer"]))
                yield from (document.get("text") or document["content"] for document in record["positive_doc"])


@pytest.fixture(scope="module")
def walk(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """Every command of the page but `serve`, each of which must end well."""
    import torch

    folder = tmp_path_factory.mktemp("whole_path")
    prepare(folder, shared_data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices of 64 columns are slower on two
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RAGPROJ_CACHE", str(folder / "cache"))
        steps: list[Step] = []
        serve: list[str] = []
        for words in commands():
            if words[0] == "serve":
                serve = words
                continue
            steps.append(ragproj(*words))
            assert steps[-1].status == 0, f"{words}\n{steps[-1].out}\n{steps[-1].err}"
        yield Walk(folder, steps, serve)
    torch.set_num_threads(threads)


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_step_in_order(walk: Walk) -> None:
    verbs = [verb_of(step.words) for step in walk.steps]
    assert verbs == [
        *("data multi-doc-qa", "data mine", "finetune bge", "data generation", "finetune chatglm3"),
        *("ingest", "ask", "validate", "ingest", "evaluate", "merge"),
    ]
    assert verb_of(walk.serve) == "serve"


def test_the_shipped_config_serves_what_the_shipped_trainings_write(walk: Walk) -> None:
    bge, chatglm3 = BgeTrainingConfig.read(Path(BGE_CONFIG)), ChatGlm3TrainingConfig.read(Path(CHATGLM3_CONFIG))
    served = load_config(CONFIG).model_dump()
    assert served["embeddings"]["adapter"] == str(bge.output / "model")
    assert served["llm"]["adapter"] == str(chatglm3.output / "model")
    assert (served["embeddings"]["model"], served["llm"]["model"]) == (bge.model, chatglm3.model)
    assert served["llm"]["quantization"] == "nf4"  # as method qlora trains
    assert chatglm3.method == "qlora"


@pytest.mark.parametrize(("run", "metric"), [("bge_lora", "ndcg@10"), ("chatglm3_qlora", "char_f1")])
def test_the_gate_let_both_adapters_pass_with_their_figures(walk: Walk, run: str, metric: str) -> None:
    report = json.loads((walk.folder / "runs" / run / "model" / "ragproj.json").read_text(encoding="utf-8"))
    figures = report["metrics"]["dev"][metric]
    assert report["promoted"]
    assert figures["low"] > 0
    assert "通过" in next(step.out for step in walk.steps if step.words[:1] == ["finetune"] and run in step.words[3])


# -- what both models make of it -----------------------------------------------------------------------------------


def ask(walk: Walk, question: str, *words: str) -> Any:
    step = ragproj("ask", question, "--kb", "my_kb", "--config", CONFIG, "--json", *SERVED.split(), *words)
    assert step.status == 0, step.err
    return step.json


def test_an_answer_is_the_adapters_and_not_the_bases(walk: Walk) -> None:
    answer = ask(walk, "采购申请由谁审批")
    assert answer["source_documents"][0]["text"] == RULE
    assert answer["result"] == ask(walk, "采购申请由谁审批")["result"]  # temperature 0
    assert answer["result"] != ask(walk, "采购申请由谁审批", "llm.adapter=null")["result"]


def test_a_knowledge_base_of_one_adapter_is_not_asked_with_another(walk: Walk) -> None:
    step = ragproj("ask", "？", "--kb", "my_kb", "--config", CONFIG, *SERVED.split(), "embeddings.adapter=null")
    assert step.status == 1
    assert "ragproj reembed" in step.err


@contextlib.contextmanager
def serving(walk: Walk) -> Iterator[tuple[str, str]]:
    """The page's last command in a process: (its address, what it said until then)."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ui.cli", *walk.serve, "--port", "0"],
        cwd=walk.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    try:
        said, address = "", None
        for line in process.stderr:
            said += line
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert address, said
        yield address.group(), said
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


@pytest.mark.browser
def test_the_page_answers_in_a_browser(walk: Walk) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Chromium: apt-get install chromium")
    question = "采购申请由谁审批"
    expected = ask(walk, question)
    with serving(walk) as (address, said), playwright.sync_playwright() as driver:
        # loaded before the page is there, not when the first question waits
        assert 0 < said.index("loading: models/bge") < said.index("loading: models/chatglm3") < said.index(address)
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(locale="zh-CN")
        page.goto(address)
        page.wait_for_selector(".welcome")
        page.locator("#question textarea").fill(question)
        page.keyboard.press("Enter")
        turn = page.locator("#conversation-html .turn")
        turn.wait_for(timeout=30_000)
        assert letters(turn.locator(".answer").inner_text()) == letters(expected["result"])
        supported = [citation["n"] for citation in expected["citations"] if citation["supported"]]
        assert turn.locator(".citations .source").count() == len(supported)
        chromium.close()


def letters(text: str) -> str:
    """A text without what Markdown makes of it."""
    return re.sub(r"\W", "", text)


# -- what can be done wrong on the way -------------------------------------------------------------------------------

WITH_BOTH = f"--config {CONFIG} {SERVED}"
MISTAKES = [
    # (what is typed, exit status, what the message must name)
    (f"ask 谁审批 --kb my_kb {WITH_BOTH} llm.adapter=runs/nowhere", 1, ["runs/nowhere", "adapter=null"]),
    (f"ingest my_documents --kb kb2 {WITH_BOTH} embeddings.adapter=runs/nowhere", 1, ["runs/nowhere", "adapter=null"]),
    (
        f"ask 谁审批 --kb my_kb {WITH_BOTH} llm.adapter=runs/bge_lora/model",
        1,
        ["适配器 runs/bge_lora/model", "底座是 models/bge"],
    ),
    (
        f"ingest my_documents --kb kb2 {WITH_BOTH} embeddings.adapter=runs/chatglm3_qlora/model",
        1,
        ["适配器 runs/chatglm3_qlora/model", "底座是 models/chatglm3"],
    ),
    (f"ask 谁审批 --kb my_kb {WITH_BOTH} llm.model=models/not/there", 1, ["找不到模型目录 models/not/there"]),
    (f"ingest my_documents --kb kb2 {WITH_BOTH} embeddings.model=models/chatglm3", 1, ["models/chatglm3/config.json"]),
    (f"ask 谁审批 --kb my_kb {WITH_BOTH} embeddings.adaptor=runs/x", 2, ["embeddings", "adaptor", "adapter"]),
    (f"ask 谁审批 --kb nowhere {WITH_BOTH}", 1, ["nowhere", "ragproj ingest"]),
    ("data multi-doc-qa empty --out out", 2, ["empty", ".jsonl"]),
    ("data multi-doc-qa broken.jsonl --out out", 1, ["broken.jsonl:1"]),
    ("data generation data/retrieval_train.jsonl --out out", 1, ["data/retrieval_train.jsonl:1", "question"]),
    (f"finetune bge --config {BGE_CONFIG} train=[data/none.jsonl] model=models/bge", 1, ["data/none.jsonl"]),
    (f"finetune bge --config {BGE_CONFIG} model=models/bge seed=7", 2, ["runs/bge_lora/model", "output"]),
    (
        f"finetune chatglm3 --config {CHATGLM3_CONFIG} output=runs/other model=models/bge",
        1,
        ["models/bge", "tokenizer"],
    ),
    ("merge runs/bge_lora/model models/merged", 1, ["runs/bge_lora/model", "models/bge", "不是 ChatGLM3"]),
    ("merge runs/nowhere/model models/merged", 1, ["runs/nowhere/model"]),
]


@pytest.mark.parametrize(("typed", "status", "named"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_on_the_way_is_told_in_a_sentence(walk: Walk, typed: str, status: int, named: list[str]) -> None:
    (walk.folder / "empty").mkdir(exist_ok=True)
    (walk.folder / "broken.jsonl").write_text("{oops\n", encoding="utf-8")
    step = ragproj(*typed.split())
    assert step.status == status, step.err
    assert "Traceback" not in step.err
    assert " / " in step.err  # in both languages
    for name in named:
        assert name in step.err
