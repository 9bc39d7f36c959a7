"""What each verb of the command does; `ui.cli` names them."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from chains.config import RagConfig, load_config
from loaders.errors import RagProjError, UsageError
from ui.generate_commands import NOT_SUPPORTED

_T = TypeVar("_T")


def serve(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted."""
    for key in ("host", "port"):
        value = getattr(arguments, key)
        if value is not None:
            arguments.overrides = [*arguments.overrides, f"server.{key}={json.dumps(value)}"]
    config = _config(arguments)
    host, port = config.server.host, config.server.port
    password = os.environ.get("RAGPROJ_PASSWORD") or _secret(config)
    if not _is_loopback(host) and not password:
        raise UsageError(
            f"监听 {host} 会让其他机器访问，必须先设置密码：环境变量 RAGPROJ_PASSWORD，或配置 server.password",
            f"{host} is reachable from other machines and needs a password: set RAGPROJ_PASSWORD or server.password",
        )
    from ui.app import build_app, free_port, launch  # gradio takes seconds to import
    from ui.examples import example_questions
    from ui.service import RagService

    port = free_port(host, port)  # a port in use is told before models are loaded
    service = RagService(config, create=True, any_embedder=True)
    print(f"知识库 / knowledge base: {config.kb}，{len(service.sources())} 个文档 / documents", file=sys.stderr)
    embedder = service.embedder()
    if embedder.differs:
        print(
            f"向量由 {embedder.answering} 生成，配置的是 {embedder.configured}；在网页的“知识库”中换用 /"
            " the vectors are by another embedder than the configured one; change over on the page",
            file=sys.stderr,
        )
    try:
        if not arguments.no_preload:
            service.load(lambda model: print(f"加载 / loading: {model}", file=sys.stderr))
        app = build_app(
            service, examples=example_questions(service.knowledge_base), language=config.language, top_k=config.top_k
        )
        launch(app, host=host, port=port, auth=(config.server.username, password) if password else None)
    finally:
        service.close()
    return 0


def ingest(arguments: argparse.Namespace) -> int:
    """Add files; 1 when any of them failed."""
    if not arguments.paths:
        raise UsageError("ingest 需要至少一个文件或文件夹", "ingest needs at least one file or folder")
    service = _service(_config(arguments), create=True)
    stop = threading.Event()
    with tqdm(desc="ingest", unit="file", delay=1, file=sys.stderr) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name[-40:], refresh=False)
            bar.update(done - bar.n)

        try:
            paths = [Path(path) for path in arguments.paths]
            report = service.ingestor().ingest(paths, sync=arguments.sync, progress=progress, stop=stop)
        finally:
            service.close()
    if arguments.json:
        _print_json(report.as_dict())
    else:
        for failure in report.failed:
            print(f"✗ {failure['reason']}", file=sys.stderr)
        print(
            f"新增 {report.added}，更新 {report.updated}，未变 {report.unchanged}，移除 {report.removed}，"
            f"失败 {len(report.failed)} 个文件；{report.chunks} 个片段，{report.seconds:.1f} 秒"
            " / added, updated, unchanged, removed, failed; chunks; seconds"
        )
        if report.cut:
            print(f"{report.cut} 个片段太长，末尾没有进入向量 / chunks too long for the embedder, their ends are cut")
    if report.is_empty:
        print("没有找到可导入的文件 / found no file to ingest", file=sys.stderr)
    return 1 if report.failed or report.is_empty else 0


def ask(arguments: argparse.Namespace) -> int:
    """Answer a question, as it is generated."""
    service = _service(_config(arguments))
    if arguments.json:
        output = dict(service.qa.invoke({"query": arguments.question}))
        output["source_documents"] = [_document(document) for document in output["source_documents"]]
        _print_json(output)
        return 0
    citations: list[dict[str, Any]] = []
    used: list[int] | None = None
    truncated = False
    for piece in service.qa.stream({"query": arguments.question}):
        print(piece.get("result", ""), end="", flush=True)
        citations += piece.get("citations", [])
        used = piece.get("references_used", used)
        truncated = piece.get("truncated", truncated)
    print()
    if truncated:
        print(
            "回答没有写完：已到 token 上限 / cut off: out of tokens (llm.max_tokens, max_new_tokens)", file=sys.stderr
        )
    if used is not None:
        print(f"只用了资料 / references used: {', '.join(map(str, used))}", file=sys.stderr)
    for citation in citations:
        if not citation["supported"]:
            print(f"[{citation['n']}] {NOT_SUPPORTED}")
            continue
        page = f" 第 {citation['page']} 页 / p. {citation['page']}" if citation["page"] is not None else ""
        print(f"[{citation['n']}] {citation['source']}{page} @{citation['start']}-{citation['end']}")
    return 0


def search(arguments: argparse.Namespace) -> int:
    """Find passages."""
    if arguments.top_k is not None:
        arguments.overrides = [*arguments.overrides, f"top_k={arguments.top_k}"]
    service = _service(_config(arguments))
    query = service.qa.check_question(arguments.query)
    hits = [
        {"rank": rank, **_document(document)} for rank, document in enumerate(service.qa.retriever.invoke(query), 1)
    ]
    if arguments.json:
        _print_json({"query": query, "hits": hits})
        return 0
    for hit in hits:
        print(f"{hit['rank']}. [{hit['score']:.2f}] {hit['source']} @{hit['metadata']['start']}")
        print(f"   {' '.join(hit['text'].split())[:200]}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure retrieval and answers."""
    from chains.evaluation import evaluate as run
    from chains.evaluation import read_questions, write_report

    questions = read_questions(Path(arguments.questions))
    service = _service(_config(arguments))
    report = run(service.qa, questions, retrieval_only=arguments.retrieval_only, progress=_bar)
    _print_json(report) if arguments.json else print(write_report(report))
    return 0


def sources(arguments: argparse.Namespace) -> int:
    """List what the knowledge base holds."""
    from chains.knowledge_base import KnowledgeBase

    rows = KnowledgeBase(_config(arguments).kb).sources()
    if arguments.json:
        _print_json({"sources": [vars(row) for row in rows]})
        return 0
    for row in rows:
        print(f"{row.source}\t{row.title}\t{row.chunks} 片段 / chunks\t{row.characters} 字 / characters\t{row.added}")
    return 0


def remove(arguments: argparse.Namespace) -> int:
    """Remove documents; 1, with nothing removed, when one is not there."""
    if not arguments.sources:
        raise UsageError("remove 需要至少一个文档", "remove needs at least one document")
    service = _service(_config(arguments), only_documents=True)
    names = [_resolve(name, service.knowledge_base.source_names()) for name in arguments.sources]
    removed = service.remove(names)
    _print_json({"removed": removed, "sources": names}) if arguments.json else print(
        f"已移除 {removed} / removed {removed}"
    )
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Verify that the database and its indexes agree; 1 when they do not."""
    from chains.checks import check as run

    service = _service(_config(arguments), only_documents=True)
    report = run(service.store, service.fulltext)
    if arguments.json:
        _print_json(report.as_dict())
    else:
        for problem in report.problems:
            print(f"✗ {problem}")
        for source in report.unfinished:
            print(f"… 未完成的导入 / unfinished: {source}")
        verdict = "一致 / consistent" if report.ok else f"{len(report.problems)} 个问题 / problems"
        print(f"{report.sources} 个文档 / documents，{report.chunks} 个片段 / chunks：{verdict}")
    return 0 if report.ok else 1


def reembed(arguments: argparse.Namespace) -> int:
    """Change over to the configured embedder, or back."""
    from chains.knowledge_base import KnowledgeBase
    from chains.reembedding import discard
    from chains.reembedding import reembed as run
    from chains.retrieval_qa import open_vectorstore

    config = _config(arguments)
    if arguments.discard:
        with KnowledgeBase(config.kb) as knowledge_base:
            discarded = discard(knowledge_base)
        if arguments.json:
            _print_json({"discarded": discarded})
        else:
            print(f"已丢弃 {len(discarded)} 份没有做完的向量 / unfinished sets of vectors discarded")
        return 0
    store = open_vectorstore(config)
    with tqdm(desc="reembed", unit="chunk", delay=1, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = run(store, rollback=arguments.rollback, progress=progress)
    store.save_cache()
    if arguments.json:
        _print_json(vars(report))
    elif report.switched:
        print(f"已切换到 {report.fingerprint}，新生成向量 {report.embedded} 个 / switched; vectors made")
    else:
        print(f"已经在用 {report.fingerprint}，无需更换 / in use already, nothing to do")
    return 0


def import_faiss(arguments: argparse.Namespace) -> int:
    """Bring in a folder of langchain_community's FAISS."""
    from chains.import_faiss import import_faiss as run

    service = _service(_config(arguments), create=True)
    with tqdm(desc="import", unit="document", delay=1, file=sys.stderr) as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        imported = run(
            service.store,
            Path(arguments.folder),
            trusted=arguments.trust_pickle,
            index_name=arguments.index_name,
            progress=progress,
        )
    service.fulltext.save_cache()
    _print_json({"imported": imported}) if arguments.json else print(f"已导入 {imported} 个文档 / documents imported")
    return 0


def validate(arguments: argparse.Namespace) -> int:
    """Check a config; prints what it comes to."""
    config = _config(arguments)
    plain = config.model_dump(mode="json", by_alias=True)
    if arguments.json:
        _print_json({"ok": True, "config": plain})
    else:
        import yaml

        print(yaml.safe_dump(plain, allow_unicode=True, sort_keys=False), end="")
    return 0


def _config(arguments: argparse.Namespace) -> RagConfig:
    overrides = list(arguments.overrides)
    config = load_config(arguments.config, overrides)
    return config if arguments.kb is None else config.model_copy(update={"kb": Path(arguments.kb)})


def _service(config: RagConfig, *, create: bool = False, only_documents: bool = False) -> Any:
    from ui.service import RagService

    return RagService(config, create=create, only_documents=only_documents)


def _resolve(name: str, known: list[str]) -> str:
    """The source a name means: itself, the same path written otherwise, or the only one with that file name."""
    absolute = os.path.abspath(name)  # noqa: PTH100 as ingest names sources
    same_name = [source for source in known if Path(source).name == name]
    for candidates in ([name], [absolute], same_name):
        found = [source for source in candidates if source in known]
        if len(found) == 1:
            return found[0]
    if same_name:
        raise RagProjError(
            f"有 {len(same_name)} 个文档叫 {name}，请写全路径：{', '.join(same_name)}",
            f"{len(same_name)} documents are called {name}; write the whole path: {', '.join(same_name)}",
        )
    raise RagProjError(
        f"知识库中没有 {name}；用 ragproj sources 查看有哪些",
        f"no document {name}; ragproj sources lists what there is",
    )


def _document(document: Any) -> dict[str, Any]:
    metadata = dict(document.metadata)
    return {
        "score": metadata.pop("score", None),
        "id": document.id,
        "source": metadata.get("source"),
        "text": document.page_content,
        "metadata": metadata,
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _secret(config: RagConfig) -> str | None:
    password = config.server.password
    return None if password is None else password.get_secret_value()


def _bar(items: Iterable[_T]) -> Iterable[_T]:
    return tqdm(items, delay=1, file=sys.stderr)


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))
