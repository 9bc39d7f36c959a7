"""What `ragproj generate` and `ragproj merge` do: a generator without a knowledge base; `ui.cli` names them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from loaders.config import apply_overrides
from loaders.errors import RagProjError, UsageError

NOT_SUPPORTED = "资料不支持 / not supported by the source"


def generate(arguments: argparse.Namespace) -> int:
    """Answer a question from references that are given."""
    options = apply_overrides({}, arguments.overrides)
    language = options.pop("language", "zh")
    if language not in ("zh", "en"):
        raise UsageError(f"language 应为 zh 或 en，实际是 {language}", f"language must be zh or en, got {language}")
    references = read_references(Path(arguments.references))
    from langchain_core.documents import Document

    from chains.answerers import AnswerInput, ChatModelAnswerer

    model = _model(arguments, options)
    passages = [Document(text, metadata={"source": f"{arguments.references}:{n}"}) for n, text in references]
    answerer = ChatModelAnswerer(model=model, language=language)
    answer: Any = None
    for piece in answerer.stream(AnswerInput(question=arguments.question, passages=passages)):
        answer = piece if answer is None else answer + piece
        if not arguments.json:
            print(piece.get("result", ""), end="", flush=True)
    if arguments.json:
        print(json.dumps({"question": arguments.question, **answer}, ensure_ascii=False))
        return 0
    print()
    for citation in answer["citations"]:
        said = f"{citation['source']}  {citation['quote']}" if citation["supported"] else NOT_SUPPORTED
        print(f"[{citation['n']}] {said}")
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Merge an adapter into its base."""
    options = apply_overrides({}, arguments.overrides)
    unknown = sorted(set(options) - {"device", "dtype", "quantization"})
    if unknown:
        raise UsageError(
            f"merge 没有设置 {'、'.join(unknown)}，可用：device、dtype、quantization",
            f"merge has no setting {', '.join(unknown)}; it has device, dtype and quantization",
        )
    from finetune.chatglm3.merge import merge_adapter

    report = merge_adapter(
        Path(arguments.adapter),
        Path(arguments.out),
        base=arguments.base,
        original=arguments.original,
        tell=lambda line: print(line, file=sys.stderr),
        **options,
    )
    if arguments.json:
        found = {**vars(report), "target": str(report.target), "original": report.original and str(report.original)}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(
        f"已合并 / merged：{report.target}（{report.dtype}），输出最大相差 {report.difference:.2g}"
        f"（允许 {report.tolerance:.2g}）/ largest difference of logits"
    )
    if report.original is not None:
        print(f"原版布局 / original layout：{report.original}")
    return 0


def read_references(path: Path) -> list[tuple[int, str]]:
    """(line, text) of each reference in a file: JSON strings or records with a `text`, else paragraphs of plain text.

    A record with `references` gives all of them, so that a file of training rows works, too.

    Raises:
        RagProjError: the file cannot be read or holds no text.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RagProjError(f"无法读取参考资料 {path}：{error}", f"cannot read references {path}: {error}") from error
    found = list(_from_json(content, path)) if path.suffix in {".json", ".jsonl"} else list(_paragraphs(content))
    if not found:
        raise RagProjError(f"{path} 中没有参考资料", f"{path} holds no reference")
    return found


def _paragraphs(content: str) -> list[tuple[int, str]]:
    found, line = [], 1
    for part in content.split("\n\n"):
        if part.strip():
            found.append((line + len(part) - len(part.lstrip("\n")), part.strip()))
        line += part.count("\n") + 2
    return found


def _from_json(content: str, path: Path) -> list[tuple[int, str]]:
    try:
        if content.lstrip().startswith("["):
            records = [(1, record) for record in json.loads(content)]
        else:
            records = [(n, json.loads(line)) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    except ValueError as error:
        raise RagProjError(f"{path} 不是有效的 JSON：{error}", f"{path} is not valid JSON: {error}") from error
    return [(line, text) for line, record in records for text in _texts(record, path, line)]


def _texts(record: object, path: Path, line: int) -> list[str]:
    texts: object = record
    if isinstance(record, dict):
        texts = record.get("references", record.get("text"))
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RagProjError(
            f'{path}:{line}：参考资料应为文本、{{"text"}} 或 {{"references": [...]}}',
            f'{path}:{line}: a reference is a text, {{"text"}} or {{"references": [...]}}',
        )
    return texts


def _model(arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    """The chat model of a directory or id: ChatGLM3, or another with a template of its own."""
    from pydantic import ValidationError

    from chains.chatglm3.chat_model import ChatGLM3, HuggingFaceChatModel
    from chains.chatglm3.checkpoints import read_json
    from chains.chatglm3.directories import native_directory

    directory = native_directory(arguments.model)
    kind = ChatGLM3 if read_json(directory / "config.json").get("model_type") == "glm" else HuggingFaceChatModel
    given = {"adapter": arguments.adapter} if arguments.adapter else {}
    try:
        return kind(**{"model": str(directory), "temperature": 0, **given, **options})
    except ValidationError as error:
        listed = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"生成设置有误：{listed}", f"wrong setting of the generator: {listed}") from None
