"""Every string the page shows, Chinese and English side by side."""

from __future__ import annotations

from typing import Literal, NamedTuple

Language = Literal["zh", "en"]


class Text(NamedTuple):
    """One string in both languages; the same `{placeholders}` in each."""

    zh: str
    en: str


STRINGS: dict[str, Text] = {
    # the frame
    "title": Text("知识库问答 RagProj", "RagProj: ask your documents"),
    "brand": Text("知识库问答", "Knowledge base Q&A"),
    "tagline": Text(
        "只依据你的文档作答，每句都可查到出处", "Answers from your documents only, every claim with its source"
    ),
    "other_language": Text("English", "中文"),
    "tab_chat": Text("提问", "Ask"),
    "tab_sources": Text("知识库", "Knowledge base"),
    "notice": Text("提示", "Notice"),
    # asking
    "question": Text("问题", "Question"),
    "question_placeholder": Text("输入问题，按回车发送", "Ask a question, Enter to send"),
    "send": Text("发送", "Send"),
    "stop": Text("停止", "Stop"),
    "clear": Text("清空对话", "Clear chat"),
    "settings": Text("回答设置", "Answer settings"),
    "generator": Text("回答方式", "Generator"),
    "generator_info": Text("由谁根据检索到的段落写出回答", "What writes the answer from the passages found"),
    "extractive": Text("摘录原文（不用大模型）", "Quotes from the documents (no language model)"),
    "top_k": Text("参考段落数", "Passages to use"),
    "top_k_info": Text("每个问题最多参考多少段原文", "How many passages each answer may draw on"),
    "empty_question": Text("请先输入问题。", "Type a question first."),
    "busy": Text(
        "上一个回答还没有结束，请稍候或先停止。", "The previous answer is still running: wait, or stop it first."
    ),
    # the conversation
    "welcome": Text("想了解什么？", "What would you like to know?"),
    "welcome_hint": Text(
        "从下面的例子开始，或直接输入你的问题。", "Start with one of these, or type your own question."
    ),
    "welcome_plain": Text("在下面输入你的问题。", "Type your question below."),
    "kb_empty": Text("知识库还是空的", "The knowledge base is empty"),
    "kb_empty_hint": Text(
        "先上传几份文档，然后就可以就它们提问。", "Upload some documents first, then ask about them."
    ),
    "go_upload": Text("上传文档", "Upload documents"),
    "searching": Text("正在查找相关段落…", "Looking for passages…"),
    "writing": Text("正在生成回答…", "Writing the answer…"),
    "refused": Text("知识库里没有找到依据", "Nothing in the knowledge base supports an answer"),
    "stopped": Text("已停止", "Stopped"),
    "failed": Text("没能回答", "Could not answer"),
    "internal_error": Text(
        "程序内部出错，详情已写入服务器日志。", "Something went wrong inside; the server log has the details."
    ),
    "citations": Text("出处", "Sources"),
    "struck_out": Text(
        "划掉的 {numbers}：资料中没有支持那句话的内容。",
        "Struck out, {numbers}: the source does not bear out what is said there.",
    ),
    "truncated": Text(
        "回答没有写完：已到字数上限（llm.max_tokens，本机模型是 llm.max_new_tokens）。",
        "The answer is cut off: it reached its limit (llm.max_tokens; llm.max_new_tokens of a model on this machine).",
    ),
    "references_used": Text(
        "模型放不下全部 {found} 段资料，只用了前 {used} 段。",
        "The model has no room for all {found} passages: only the first {used} were used.",
    ),
    "unsupported": Text("资料中没有支持这句话的内容", "The source does not bear this out"),
    "open_citation": Text("查看出处 {n}", "Show source {n}"),
    "copy": Text("复制", "Copy"),
    "copied": Text("已复制", "Copied"),
    # the passage a citation stands for
    "passage": Text("原文出处", "Source passage"),
    "close": Text("关闭", "Close"),
    "page": Text("第 {page} 页", "page {page}"),
    "slide": Text("第 {slide} 张幻灯片", "slide {slide}"),
    "sheet": Text("工作表 {sheet}", "sheet {sheet}"),
    "also_in": Text("同样的文字还见于", "The same text also stands in"),
    "more_sources": Text("另见 {count} 处", "{count} more"),
    "passage_gone": Text(
        "找不到这条出处，请重新提问。", "This citation is no longer available: ask the question again."
    ),
    # the knowledge base
    "drop_files": Text("把文件拖到这里，或点击选择", "Drop files here, or click to choose"),
    "drop_hint": Text(
        "可以一次放入多个：PDF、Word、PPT、Excel、Markdown、网页、文本等",
        "Several at once: PDF, Word, PowerPoint, Excel, Markdown, web pages, text and more",
    ),
    "uploading": Text("正在上传 {done}/{total}：{name}", "Uploading {done}/{total}: {name}"),
    "ingesting": Text("正在处理 {done}/{total}：{name}", "Processing {done}/{total}: {name}"),
    "ingest_done": Text(
        "新增 {added} 份，更新 {updated} 份，未变 {unchanged} 份，共写入 {chunks} 段，用时 {seconds} 秒。",
        "{added} added, {updated} updated, {unchanged} unchanged; chunks stored: {chunks} ({seconds} s).",
    ),
    "stopping": Text("正在停止…", "Stopping…"),
    "ingest_stopped": Text("已停止，还有 {count} 份没有处理。", "Stopped before {count} of the files."),
    "ingest_failed": Text("{count} 份没有成功：", "{count} failed:"),
    "upload_refused": Text(
        "上传没有成功：文件可能超过 {limit} MB，或连接中断。",
        "The upload failed: over {limit} MB, or the connection broke.",
    ),
    "file": Text("文件", "File"),
    "reason": Text("原因", "Reason"),
    # the embedder
    "embedder": Text("向量模型", "Embedder"),
    "embedder_differs": Text(
        "现在由 {answering} 回答，配置的是 {configured}。", "{answering} answers now, {configured} is configured."
    ),
    "embedder_hint": Text(
        "换用它要为全部文档重新生成向量。期间照常提问和上传，完成后自动切换；可以随时停止，下次接着做。",
        "To change over, vectors of all documents are made again. Ask and upload as usual meanwhile; it takes over"
        " when they are done. Stop at any time: the next run goes on from there.",
    ),
    "embedder_ready": Text(
        "它的向量仍然保留，切换只需补上此后加入的文档。",
        "Its vectors are kept: only documents added since are still to be done.",
    ),
    "embedder_kept": Text(
        "现在由 {answering} 回答，{kept} 的向量仍然保留。", "{answering} answers now, the vectors of {kept} are kept."
    ),
    "reembed": Text("重新生成向量", "Re-embed"),
    "switch_over": Text("切换", "Switch over"),
    "roll_back": Text("切换回旧模型", "Go back to the old one"),
    "reembedding": Text("正在生成向量 {done}/{total}", "Making vectors {done}/{total}"),
    "reembed_stopped": Text("已停止，做好的向量已保存。", "Stopped; the vectors made so far are kept."),
    "sources": Text("已入库的文档", "Documents in the knowledge base"),
    "filter": Text("筛选文档", "Filter documents"),
    "filter_placeholder": Text("按名称筛选", "Filter by name"),
    "source_name": Text("名称", "Name"),
    "chunks": Text("段数", "Chunks"),
    "characters": Text("字数", "Characters"),
    "added": Text("加入时间", "Added"),
    "select": Text("选择 {name}", "Select {name}"),
    "select_all": Text("全选", "Select all"),
    "remove": Text("移除所选", "Remove selected"),
    "confirm_remove": Text("确认移除 {count} 份？", "Remove {count} now?"),
    "cancel": Text("取消", "Cancel"),
    "removed": Text("已移除 {count} 份：{names}", "Removed {count}: {names}"),
    "removed_none": Text("没有移除任何文档。", "Nothing was removed."),
    "no_sources": Text("还没有文档。", "No documents yet."),
    "no_match": Text("没有名称匹配的文档。", "No document matches."),
    "totals": Text("共 {count} 份，{chunks} 段", "Documents: {count}, chunks: {chunks}"),
    "first_only": Text(
        "只列出前 {shown} 份，可用筛选查找其余。", "Only the first {shown} are listed; filter to find others."
    ),
}


def tr(key: str, language: Language, **values: object) -> str:
    """The string `key` in `language`, its placeholders filled from `values`."""
    text = STRINGS[key]
    return (text.zh if language == "zh" else text.en).format(**values)


def other(language: Language) -> Language:
    """The language the switch leads to."""
    return "en" if language == "zh" else "zh"
