"""The `ragproj` command: what it is called with. Only the standard library is imported until a verb runs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

_DESCRIPTION = "知识库问答：向自己的文档提问，答案注明出处。 Ask your own documents; answers show where they stand."
_DATA = "ui.data_commands"
_OVERRIDES = "覆盖配置项，如 top_k=3 splitter.chunk_size=300 / config overrides"


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb; `arguments.module` and `arguments.function` say what runs it."""
    parser = argparse.ArgumentParser(prog="ragproj", description=_DESCRIPTION)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    serve = _verb(verbs, "serve", "启动网页 / serve the page")
    serve.add_argument(
        "--host", help="监听地址，默认 127.0.0.1；其他地址必须设置密码 / other addresses need a password"
    )
    serve.add_argument("--port", type=int, help="端口，默认 7860 / port")
    serve.add_argument(
        "--no-preload", action="store_true", help="第一次提问时才加载模型 / load models with the first question"
    )

    ingest = _verb(verbs, "ingest", "把文件或文件夹加入知识库 / add files and folders to the knowledge base")
    ingest.add_argument("paths", nargs="+", metavar="PATH", help="文件或文件夹；其后可跟覆盖项 / files and folders")

    ingest.add_argument(
        "--sync", action="store_true", help="同时移除文件夹里已删除的文件 / also remove what disappeared"
    )

    ask = _verb(verbs, "ask", "提一个问题 / ask a question")
    ask.add_argument("question", metavar="QUESTION")

    search = _verb(verbs, "search", "只检索，不回答 / find passages without answering")
    search.add_argument("query", metavar="QUERY")
    search.add_argument("--top-k", type=int, help="返回的片段数，默认取配置 / passages to return")

    evaluate = _verb(verbs, "evaluate", "用带答案的问题评测 / measure with questions that have answers")
    evaluate.add_argument("--questions", required=True, metavar="FILE", help="JSONL：question, answers, context_id …")
    evaluate.add_argument("--retrieval-only", action="store_true", help="只评测检索 / skip answering")

    _verb(verbs, "sources", "列出知识库里的文档 / list the documents")

    remove = _verb(verbs, "remove", "从知识库移除文档 / remove documents")
    remove.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="sources 列出的名字或其文件名 / as listed by sources"
    )

    _verb(verbs, "check", "检查数据库、向量索引和全文索引是否一致 / verify that database and indexes agree")

    reembed = _verb(verbs, "reembed", "换用配置中的嵌入模型 / change over to the configured embedder")
    other = reembed.add_mutually_exclusive_group()
    other.add_argument("--rollback", action="store_true", help="切换回上一个模型的向量 / back to the vectors before")
    other.add_argument("--discard", action="store_true", help="丢弃没有做完的向量 / drop vectors of a stopped change")

    faiss = _verb(
        verbs, "import-faiss", "导入 langchain_community 的 FAISS 目录 / import a FAISS folder of langchain_community"
    )
    faiss.add_argument("folder", metavar="DIR", help="含 index.faiss 和 index.pkl / with index.faiss and index.pkl")
    faiss.add_argument("--index-name", default="index", metavar="NAME")
    faiss.add_argument("--trust-pickle", action="store_true", help="确认目录来源可信 / the folder can be trusted")

    _verb(verbs, "validate", "检查配置文件 / check a config file")
    _data(verbs.add_parser("data", help="准备训练数据 / make training data"))
    _finetune(verbs.add_parser("finetune", help="微调模型，效果有数字 / fine-tune a model and measure the gain"))
    _convert(verbs.add_parser("convert", help="转换 ChatGLM3 权重和适配器 / convert ChatGLM3 weights and adapters"))
    _generate(verbs)
    return parser


def _generate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """What a generator does without a knowledge base."""
    module = "ui.generate_commands"
    generate = _action(verbs, "generate", "根据给出的资料回答 / answer from references that are given", module=module)
    generate.add_argument("--model", required=True, metavar="MODEL", help="模型目录或模型名 / directory or model id")
    generate.add_argument("--adapter", metavar="DIR", help="LoRA 适配器 / LoRA adapter")
    generate.add_argument("--question", required=True, metavar="QUESTION")
    generate.add_argument(
        "--references", required=True, metavar="FILE", help="JSONL 或按空行分段的文本 / or plain text"
    )

    merge = _action(verbs, "merge", "把适配器并入模型 / merge an adapter into its model", module=module)
    merge.add_argument("adapter", metavar="ADAPTER", help="适配器目录 / adapter directory")
    merge.add_argument("out", metavar="OUT", help="要写出的模型目录 / model directory to write")
    merge.add_argument("--base", metavar="MODEL", help="所属的模型，默认取适配器里写的 / model it belongs to")
    merge.add_argument("--original", action="store_true", help="同时写出原版布局 / the original layout, too")


def _data(parser: argparse.ArgumentParser) -> None:
    """What makes training data, each a verb of its own below `data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    multi = _action(actions, "multi-doc-qa", "转换 Multi-Doc-QA-Chinese / convert Multi-Doc-QA-Chinese", module=_DATA)
    multi.add_argument("raw", nargs="+", metavar="RAW", help="文件或文件夹；其后可跟覆盖项 / files and folders")
    multi.add_argument("--out", required=True, metavar="DIR", help="输出文件夹 / folder of the results")
    multi.add_argument("--overwrite", action="store_true", help="替换已有的结果 / replace what is there")

    rows = _action(actions, "rows", "把带出处的问题变成训练数据 / questions with known passages as rows", module=_DATA)
    rows.add_argument("--questions", required=True, metavar="FILE", help="JSONL：question, context_id / pos_ids …")
    rows.add_argument("--passages", required=True, nargs="+", metavar="FILE", help="JSONL：id, title, text")
    rows.add_argument("--out", required=True, metavar="DIR", help="输出文件夹 / folder of the results")
    rows.add_argument("--overwrite", action="store_true", help="替换已有的结果 / replace what is there")

    generation = _action(
        actions, "generation", "生成模型的训练数据：引用、干扰、拒答、追问 / rows for the generator", module=_DATA
    )
    generation.add_argument("rows", nargs="+", metavar="FILE", help="JSONL：question, references, answer")
    generation.add_argument("--out", required=True, metavar="DIR", help="输出文件夹 / folder of the results")
    generation.add_argument("--overwrite", action="store_true", help="替换已有的结果 / replace what is there")

    mine = _action(actions, "mine", "挖掘难负例 / mine hard negatives", module=_DATA)
    mine.add_argument("--rows", required=True, nargs="+", metavar="FILE", help="检索训练数据 JSONL / retrieval rows")
    mine.add_argument(
        "--passages", nargs="+", default=[], metavar="FILE", help="更多候选段落 / further passages, JSONL"
    )
    mine.add_argument("--out", required=True, metavar="FILE", help="输出的训练数据 / the rows with their negatives")
    mine.add_argument("--overwrite", action="store_true", help="替换已有的结果 / replace what is there")


def _finetune(parser: argparse.ArgumentParser) -> None:
    """What can be fine-tuned."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="MODEL")
    for name, text in (
        ("bge", "微调 BGE 向量模型 / the BGE embedder"),
        ("reranker", "微调重排模型 / the reranker"),
        ("chatglm3", "微调 ChatGLM3，学会引用和拒答 / ChatGLM3, to cite and to refuse"),
    ):
        _action(actions, name, text, module="ui.finetune_commands", function=f"finetune_{name}", config_required=True)


def _convert(parser: argparse.ArgumentParser) -> None:
    """What can be brought to the layout that current libraries load."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    for name, text in (
        ("chatglm3", "原版 ChatGLM3 目录转为原生目录 / an original ChatGLM3 directory"),
        ("adapter", "原版 ChatGLM3 的 LoRA 适配器 / a LoRA adapter of the original ChatGLM3"),
    ):
        action = _action(actions, name, text, module="ui.convert_commands", function=f"convert_{name}")
        action.add_argument("source", metavar="SRC", help="来源目录 / directory to convert")
        action.add_argument("target", metavar="DST", help="目标目录 / directory to write")
        if name == "chatglm3":
            action.add_argument("--reverse", action="store_true", help="转回原版布局 / back to the original layout")
        else:
            action.add_argument("--base", metavar="DIR", help="所属的原生模型目录 / native model it belongs to")


def _verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str) -> argparse.ArgumentParser:
    """A verb over a knowledge base; the function of `ui.commands` with its name runs it."""
    parser = _action(verbs, name, text, module="ui.commands")
    parser.add_argument("--kb", metavar="DIR", help="知识库目录，默认取配置 / knowledge base directory")
    return parser


def _action(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    *,
    module: str,
    function: str | None = None,
    config_required: bool = False,
) -> argparse.ArgumentParser:
    """Something the command does, with the options that all share."""
    parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(module=module, function=function or name.replace("-", "_"))
    where = "YAML 配置 / config file" if config_required else "YAML 配置，默认用内置的 / config file"
    parser.add_argument("--config", metavar="FILE", required=config_required, help=where)
    parser.add_argument("--json", action="store_true", help="向标准输出打印一个 JSON 对象 / one JSON object on stdout")
    parser.add_argument("--verbose", action="store_true", help="显示日志 / show the log")
    parser.epilog = f"KEY=VALUE … {_OVERRIDES}"
    return parser


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other words, config overrides): `key.sub=value` is an override unless a file of that name exists."""
    others: list[str] = []
    overrides: list[str] = []
    for word in words:
        key, equals, _ = word.partition("=")
        named_like_a_key = bool(equals) and all(part.isidentifier() and part.isascii() for part in key.split("."))
        (overrides if named_like_a_key and not os.path.exists(word) else others).append(word)  # noqa: PTH110 no import
    return others, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status: 0 done, 1 failed, 2 called or configured wrongly."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without UTF-8 shows "?" instead of breaking off
            stream.reconfigure(errors="replace")
    parser = build_parser()
    arguments, extra = parser.parse_known_args(argv)
    unknown, arguments.overrides = split_overrides(extra)
    if unknown:
        parser.error(f"无法识别的参数 / unrecognised arguments: {' '.join(unknown)}")
    for name, words in list(vars(arguments).items()):
        if isinstance(words, list) and name != "overrides":  # overrides may stand at the end of a list of files
            files, overrides = split_overrides(words)
            setattr(arguments, name, files)
            arguments.overrides = [*overrides, *arguments.overrides]
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, stream=sys.stderr)
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from loaders.errors import RagProjError, UsageError

    try:
        run = getattr(importlib.import_module(arguments.module), arguments.function)
        status: int = run(arguments)
        sys.stdout.flush()
    except UsageError as error:
        return _complain(arguments, error, 2)
    except RagProjError as error:
        return _complain(arguments, error, 1)
    except KeyboardInterrupt:
        print("已中断，已提交的内容完好 / interrupted; what was committed is intact", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ragproj search … | head`: what is still buffered goes nowhere, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _complain(arguments: argparse.Namespace, error: Exception, status: int) -> int:
    print(f"ragproj {_called(arguments)}: {error}", file=sys.stderr)
    return status


def _called(arguments: argparse.Namespace) -> str:
    """The verb as it was typed, such as `ingest` or `data mine`."""
    return " ".join(filter(None, (arguments.verb, getattr(arguments, "action", None))))


if __name__ == "__main__":
    sys.exit(main())
