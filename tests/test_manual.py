"""The manual is true: it answers questions about the product, its code runs, its commands parse, its tables agree."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from chains import load_config
from chains.config import RagConfig
from ui.cli import build_parser, split_overrides
from ui.examples import MANUAL_QUESTIONS, example_questions
from ui.service import RagService

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagService]:
    """The shipped configuration over a knowledge base that holds the manual."""
    kb = tmp_path_factory.mktemp("manual") / "kb"
    service = RagService(load_config(overrides=[f"kb={kb}"]), create=True)
    report = service.ingestor().ingest(PAGES)
    assert (report.added, report.failed) == (len(PAGES), [])
    yield service
    service.close()


# Worded as a user would, not as the manual is: (question, what the answer must say, the page that says it).
QUESTIONS = [
    ("我的笔记本没有 GPU，能不能运行？", "没有显卡（GPU）的电脑也能运行", "getting_started.md"),
    ("原文件改了，要怎么让知识库刷新？", "再运行一次", "getting_started.md"),
    ("GBK 编码的 txt 能不能读？", "GB18030/GBK", "loaders.md"),
    ("扫描出来的 PDF 能识别文字吗？", 'pip install "ragproj[ocr]"', "loaders.md"),
    ("用的是 Ollama，服务地址该填什么？", "http://127.0.0.1:11434/v1", "configuration.md"),
    ("想让同事也能在他们电脑上打开这个网页，要做什么？", "RAGPROJ_PASSWORD", "web_page.md"),
    ("上传的文件最大多少兆？", "200 MB", "web_page.md"),
    ("7860 端口被别的程序占用了", "--port", "troubleshooting.md"),
    ("导入到一半程序断电了，之前导入的还在吗？", "都还在", "how_it_works.md"),
    ("怎么看知识库里现在有哪些文件？", "ragproj sources", "command_line.md"),
    ("Python 里怎样流式输出？", "qa.stream", "python.md"),
    ("磁盘满了，数据会丢吗？", "完好", "troubleshooting.md"),
    ("文件夹里删掉的文件怎么同步到知识库？", "ragproj ingest --sync", "command_line.md"),
    ("更换向量模型要重新导入文件吗？", "不需要重新导入", "command_line.md"),
    ("怎样检查知识库有没有损坏？", "ragproj check", "command_line.md"),
    ("怎样切换回旧的向量模型？", "--rollback", "command_line.md"),
    ("以前用 LangChain 的 FAISS 保存的目录能导入吗？", "import-faiss", "command_line.md"),
    ("知识库目录里哪些文件可以删除？", "faiss-*", "how_it_works.md"),
    ("网页上正在上传，怎样停止？", "停止", "web_page.md"),
    ("ChatGLM3 量化以后占多少显存？", "约占 4 GB", "chatglm3.md"),
    ("我以前训练的 LoRA 还能用吗？", "llm.adapter", "chatglm3.md"),
    ("回答里的引用为什么被划掉了？", "资料中没有支持这句话的内容", "chatglm3.md"),
    ("怎样在本机跑 Qwen？", "huggingface", "chatglm3.md"),
    ("微调过的 BGE 什么都检索不到，为什么？", "池化", "bge.md"),
    ("BGE 的查询指令要写吗？", "不用自己写", "bge.md"),
    ("我有两块显卡，能一起生成向量吗？", "一起使用", "bge.md"),
    ("BGE 向量能缩短到 256 维吗？", "只保留前 256 维", "bge.md"),
    ("难负例用什么命令挖掘？", "ragproj data mine", "training_data.md"),
    ("微调 BGE 需要什么格式的数据？", "FlagEmbedding 的格式", "training_bge.md"),
    ("训练中断了还能接着训练吗？", "最近的检查点继续", "training_bge.md"),
    ("微调好的模型怎么用到知识库里？", "ragproj reembed", "training_bge.md"),
    ("什么样的微调模型会被采用？", "95 % 区间", "training_bge.md"),
    ("怎样训练重排模型？", "ragproj finetune reranker", "training_bge.md"),
    ("两张显卡怎么一起训练？", "torchrun", "training_bge.md"),
    ("怎么知道微调有没有忘记原来的能力？", "evaluation.extra", "training_bge.md"),
    ("训练 ChatGLM3 大概要多少小时？", "6 小时", "whole_path.md"),
    ("只训练了 BGE，ChatGLM3 没有训练，怎么用？", "llm.adapter=null", "whole_path.md"),
    ("训练好的两个模型怎样一起评测？", "没有训练过的问题", "whole_path.md"),
    ("某个适配器没有通过判定，还能上线吗？", "adapter=null", "whole_path.md"),
    ("启动网页时不想马上加载模型，怎么办？", "--no-preload", "command_line.md"),
    ("本机的 Qwen 能调用工具吗？", "不会解析成 tool_calls", "chatglm3.md"),
]


@pytest.mark.parametrize(("question", "fact", "page"), QUESTIONS)
def test_the_manual_answers_a_users_question_and_cites_the_page(
    manual: RagService, question: str, fact: str, page: str
) -> None:
    answer = manual.qa.invoke({"query": question})
    assert not answer["refused"]
    assert fact in answer["result"]
    assert page in cited_pages(answer)


def test_a_heading_asked_as_a_question_is_answered_from_below_it(manual: RagService) -> None:
    """Of all section headings; those that miss have a section elsewhere that says the same."""
    missed, asked = [], 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        starts = [found.start() for found in re.finditer(r"^## ", text, re.MULTILINE)]
        for start, end in itertools.pairwise([*starts, len(text)]):
            asked += 1
            heading = text[start + 3 : text.index("\n", start)]
            citations = manual.qa.invoke({"query": f"{heading}？"})["citations"]
            if not any(found["source"].endswith(page.name) and start <= found["start"] < end for found in citations):
                missed.append(heading)
    assert asked > 200
    assert len(missed) <= 0.03 * asked, missed


@pytest.mark.parametrize("question", ["北京到上海的高铁票多少钱？", "公司的年假有几天？", "怎样做红烧肉？"])
def test_what_the_manual_does_not_say_is_refused(manual: RagService, question: str) -> None:
    answer = manual.qa.invoke({"query": question})
    assert answer["refused"]
    assert answer["citations"] == []


# What the questions that the page offers must be answered with, in the order of MANUAL_QUESTIONS.
EXAMPLE_FACTS = ("ragproj ingest", "PDF、Word、PPT、Excel", "另存为不加密的副本", "llm.base_url")


@pytest.mark.parametrize(("question", "fact"), list(zip(MANUAL_QUESTIONS, EXAMPLE_FACTS, strict=True)))
def test_the_questions_offered_on_the_page_are_answered_in_the_first_quote(
    manual: RagService, question: str, fact: str
) -> None:
    answer = manual.qa.invoke({"query": question})
    assert fact in answer["citations"][0]["quote"]


def test_the_page_offers_the_manuals_questions_while_the_knowledge_base_holds_it(manual: RagService) -> None:
    assert example_questions(manual.knowledge_base) == list(MANUAL_QUESTIONS)


def test_no_section_is_so_long_that_it_is_cut_into_several_chunks_but_for_tables_and_code(manual: RagService) -> None:
    # one section, one chunk: a quote then stands under the heading that it belongs to
    for page in PAGES:
        for section in re.split(r"^#+ ", _FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE):
            prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
            assert len(prose) <= manual.config.splitter.chunk_size, f"{page.name}: {section[:40]}"


def test_the_code_of_the_python_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(page, tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    blocks = fenced(ROOT / "docs" / "python.md", "python")
    assert len(blocks) >= 10
    names: dict[str, Any] = {"__name__": "manual"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"python.md block {number}", "exec"), names)
    output = printed.getvalue()
    assert f"{len(PAGES)} []" in output  # the report of the ingest
    assert "另存为不加密的副本" in output
    assert "采购申请由部门主管审批。" in output
    assert "知识库 missing_kb 不存在" in output


def test_the_messages_quoted_on_the_troubleshooting_page_are_those_of_the_code() -> None:
    files = [path for package in ("loaders", "chains", "ui") for path in sorted((ROOT / package).rglob("*.py"))]
    code = "\n".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / "Makefile"])
    quoted = re.findall(r"报告“(.+?)”", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) >= 20
    for message in quoted:
        # what the code fills in: file names, numbers, values
        for piece in re.split(r"…+|[A-Za-z0-9_.:/-]+", message):
            assert piece.strip(' ：，"') in code, message


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_every_command_in_the_texts_is_one_that_the_parser_takes(text: Path) -> None:
    for line in commands(text):
        arguments, extra = build_parser().parse_known_args(shlex.split(line, comments=True)[1:])
        unknown, overrides = split_overrides(extra)
        assert unknown == [], line
        if shlex.split(line)[1] not in {"data", "finetune"}:  # theirs are of training configs
            shipped = arguments.config if (ROOT / str(arguments.config)).is_file() else None
            load_config(shipped and ROOT / shipped, overrides)


def test_the_texts_show_every_verb() -> None:
    verbs = {line.split()[1] for text in TEXTS for line in commands(text)} - {"--help"}
    help_text = build_parser().format_help()
    assert verbs == set(re.findall(r"^    ([a-z-]+)(?:  |$)", help_text, re.MULTILINE))
    table = set(re.findall(r"^\| `ragproj ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert table == verbs


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_every_link_between_the_texts_leads_to_a_file(text: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", text.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://", "#")):
            assert (text.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_every_yaml_block_is_a_valid_configuration(text: Path) -> None:
    for block in fenced(text, "yaml"):
        RagConfig.from_dict(yaml.safe_load(block), where=text.name)


def test_the_tables_of_the_configuration_page_hold_every_key_with_its_default() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    documented = {key: default.strip("`") for key, default, _, _ in rows}
    assert len(documented) == len(rows), "a key stands twice"
    assert documented == settings(RagConfig)


def test_the_tables_of_the_configuration_page_name_every_component() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    allowed = dict(re.findall(r"^\| `(\w+)\._type` \| .+? \| (.+?) \|", page, re.MULTILINE))
    for key, names in allowed.items():
        members = models_in(RagConfig.model_fields[key].annotation)
        assert set(names.split("、")) == {str(member.model_fields["type"].default) for member in members}


def test_the_file_tree_of_the_readme_is_the_tree_of_the_packages() -> None:
    block = next(block for block in fenced(ROOT / "README.md", "text") if "chains/" in block)
    listed: set[str] = set()
    top = ""
    for line in block.splitlines():
        name = line.lstrip("├└─ ").split()[0]
        path = name if line[0] not in "├└" else top + name
        top = name if line[0] not in "├└" else top
        assert (ROOT / path).exists(), path
        listed.add(path)
    for package in ("chains", "finetune", "loaders", "ui"):
        for file in sorted((ROOT / package).rglob("*.*")):
            path = file.relative_to(ROOT).as_posix()
            if file.is_file() and "__pycache__" not in path and file.name not in {"__init__.py", "py.typed"}:
                assert path in listed or f"{Path(path).parent.as_posix()}/" in listed - {f"{package}/"}, path


def cited_pages(answer: dict[str, Any]) -> list[str]:
    return [Path(citation["source"]).name for citation in answer["citations"]]


def fenced(text: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return [code for name, code in _FENCE.findall(text.read_text(encoding="utf-8")) if name == language]


def commands(text: Path) -> list[str]:
    """The lines of its shell blocks that call ragproj, those that ask for help aside."""
    lines = [line for block in fenced(text, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("ragproj ") and "--help" not in line]


def settings(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every key of a config class by its dotted name, with its default as the manual writes it."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        members = models_in(field.annotation)
        if members and typing.get_origin(field.annotation) is not dict:
            default = field.get_default(call_default_factory=True)
            for member in sorted(members, key=lambda member: isinstance(default, member)):  # the default's `_type` wins
                found |= settings(member, f"{key}.")
            continue
        value = field.get_default(call_default_factory=True)
        found[key] = "必填" if value is PydanticUndefined else written(value)
    return found


def written(value: object) -> str:
    """A default as it stands in the manual: YAML in one line."""
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The config classes an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]
