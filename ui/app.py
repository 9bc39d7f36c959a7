"""The web page: layout and wiring only. What it does is in `handlers`, what it shows in `markup` and `i18n`."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

# Not inside the functions, heavy as it is: Gradio recognises an event's data by resolving the annotation
# `gr.EventData` in this module. The command line imports this module only to serve.
import gradio as gr

from loaders.errors import RagProjError
from ui import handlers, markup
from ui.handlers import ChatView, Service, Session, SourcesView
from ui.i18n import Language, tr
from ui.views import Report

HERE = Path(__file__).parent
TOP_K = 5
# what is listed first is used first: names that exist on Windows, macOS, Linux; nothing is fetched
FONTS = (
    "-apple-system",
    "Segoe UI",
    "Helvetica Neue",
    "Arial",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
)


def build_app(service: Service, *, examples: Sequence[str], language: Language = "zh", top_k: int = TOP_K) -> gr.Blocks:
    """The page over `service`, not yet served.

    Args:
        service: the knowledge base and its chain.
        examples: questions shown while the conversation is empty.
        language: the page's language until the switch is used.
        top_k: passages an answer may draw on until the slider is moved.
    """
    app: gr.Blocks = _Page(service, examples, language, top_k).app
    return app


def launch(
    app: gr.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    block: bool = True,
) -> str:
    """Serve the page; its address. With `block`, tell the address on stderr and return only after Ctrl-C.

    Args:
        app: from `build_app`.
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
        auth: user name and password to ask for.
        block: whether to wait until the server is interrupted.

    Raises:
        RagProjError: the address cannot be listened on, as when the port is in use.
    """
    port = free_port(host, port)
    _reach_self_without_proxy()
    app.queue(default_concurrency_limit=16)
    address: str
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        share=False,
        auth=auth,
        auth_message="知识库问答 RagProj",
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        max_file_size=f"{handlers.MAX_UPLOAD_MB}mb",
        ssr_mode=False,
        pwa=False,
        theme=_theme(),
        css_paths=HERE / "page.css",
    )
    if block:
        sys.stderr.write(f"网页已就绪 / the page is ready: {address}  (Ctrl-C 停止 / to stop)\n")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        app.close(verbose=False)
    return address


def free_port(host: str, port: int) -> int:
    """The port, seen to be free; for 0 a free one.

    Raises:
        RagProjError: the address cannot be listened on, as when the port is in use.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # as the server itself will do, so that a port that was just closed counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return int(probe.getsockname()[1])
        except (OSError, OverflowError) as error:
            used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            raise RagProjError(
                f"无法在 {host}:{port} 上启动网页：{'端口已被占用' if used else error}；用 --port 换一个端口",
                f"cannot serve on {host}:{port}: {'the port is in use' if used else error}; choose another with --port",
            ) from error


def _reach_self_without_proxy() -> None:
    """Gradio calls its own address when it starts; a proxy set for the outside world must not be asked for it."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*known, *(host for host in ("127.0.0.1", "localhost") if host not in known)])


def _theme() -> gr.themes.Base:
    """Gradio's plain theme in one quiet colour, on a page slightly darker than its cards."""
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONTS, font_mono=("ui-monospace", "monospace")
    )
    return theme.set(
        body_background_fill="*neutral_50",
        block_background_fill="white",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        input_background_fill="white",
        input_border_width="1px",
    )


class _Page:
    """The components of one Blocks and the events between them."""

    def __init__(self, service: Service, examples: Sequence[str], language: Language, top_k: int) -> None:
        self.service, self.examples = service, examples
        # every component with the properties that hold a string of the table: what the language switch renews
        self.texts: list[tuple[Any, dict[str, str]]] = []
        self.language = language
        # analytics_enabled=False: no request leaves this machine
        with gr.Blocks(title=tr("title", language), analytics_enabled=False, delete_cache=(3600, 3600)) as self.app:
            self.session = gr.State(Session(language), delete_callback=handlers.stop)
            self._header()
            with gr.Tabs(elem_id="tabs"):
                with self._text(gr.Tab, id="chat", label="tab_chat"):
                    self._chat(top_k)
                with self._text(gr.Tab, id="sources", label="tab_sources") as self.sources_tab:
                    self._sources()
            self._wire_chat()
            self._wire_sources()
            self._wire_embedder()
            self._wire_language()

    # ------------------------------------------------------------ layout

    def _text(self, component: Any, **settings: Any) -> Any:
        """A component whose label, placeholder, info or value is a key of the string table."""
        properties = ("label", "placeholder", "info") + (("value",) if component is gr.Button else ())
        keys = {name: settings[name] for name in properties if name in settings}
        built = component(**{**settings, **_strings(keys, self.language)})
        self.texts.append((built, keys))
        return built

    def _html(self, name: str, *, value: str = "") -> Any:
        """A gr.HTML that runs `page.js` and then its function `name`."""
        script = (HERE / "page.js").read_text(encoding="utf-8")
        call = f"{name}(element, trigger, upload);"
        return gr.HTML(value, elem_id=f"{name}-html", apply_default_css=False, js_on_load=f"{script}\n{call}")

    def _header(self) -> None:
        with gr.Row(elem_id="header"):
            self.header = self._html("header", value=markup.header(self.language))
            self.switch = self._text(gr.Button, value="other_language", elem_id="language", size="sm", scale=0)

    def _chat(self, top_k: int) -> None:
        with gr.Row(elem_id="chat"):
            with gr.Column(elem_id="ask", scale=3):
                # two components, so that a growing answer repaints itself and not the turns before it
                with gr.Column(elem_id="conversation"):
                    self.conversation = self._html("conversation")
                    self.live = gr.HTML(elem_id="live", apply_default_css=False)
                with gr.Row(elem_id="composer"):
                    self.question = self._text(
                        gr.Textbox,
                        label="question",
                        placeholder="question_placeholder",
                        lines=1,
                        max_lines=6,
                        autofocus=True,
                        container=False,
                        scale=1,
                        elem_id="question",
                    )
                    self.send = self._text(gr.Button, value="send", variant="primary", scale=0, elem_id="send")
                    self.stop = self._text(
                        gr.Button, value="stop", variant="stop", scale=0, elem_id="stop", visible=False
                    )
                with gr.Row(elem_id="below"):
                    with self._text(gr.Accordion, label="settings", open=False, elem_id="settings"):
                        generators = handlers.generators(self.service, self.language)
                        self.llm = self._text(
                            gr.Dropdown,
                            label="generator",
                            info="generator_info",
                            choices=generators,
                            value=generators[0][1] if generators else None,
                            filterable=False,
                            elem_id="generator",
                        )
                        self.top_k = self._text(
                            gr.Slider,
                            label="top_k",
                            info="top_k_info",
                            minimum=1,
                            maximum=max(20, top_k),
                            value=top_k,
                            step=1,
                            buttons=[],
                            elem_id="top-k",
                        )
                    self.clear = self._text(gr.Button, value="clear", size="sm", scale=0, elem_id="clear")
            self.passage = self._html("passage")

    def _sources(self) -> None:
        self.embedder = self._html("embedder")
        with gr.Row(elem_id="knowledge"):
            self.dropzone = self._html("dropzone", value=markup.dropzone(Report(), self.language))
            with gr.Column(elem_id="documents", scale=2):
                self.filter = self._text(
                    gr.Textbox, label="filter", placeholder="filter_placeholder", container=False, elem_id="filter"
                )
                self.table = self._html("sources")

    # ------------------------------------------------------------ wiring

    def _wire_chat(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        views = [self.conversation, self.live, self.send, self.stop, self.clear, self.question]

        def ask(session: Session, question: str, llm: str | None, top_k: int) -> Iterator[list[Any]]:
            for view in handlers.ask(
                self.service, session, question, examples=self.examples, llm=llm, top_k=int(top_k)
            ):
                yield self._chat_updates(view, session)

        def clear(session: Session) -> list[Any]:
            view = handlers.clear(self.service, session, examples=self.examples)
            return [*self._chat_updates(view, session), ""]

        def cite(session: Session, event: gr.EventData) -> str:
            return handlers.open_passage(self.service, session, event.turn, event.n)

        asking: dict[str, Any] = {
            "fn": ask,
            "inputs": [self.session, self.question, self.llm, self.top_k],
            "outputs": views,
            **quiet,
        }
        gr.on([self.question.submit, self.send.click], **asking)
        self.conversation.example(_example, None, self.question, **quiet).then(**asking)
        # not through the queue: it must get through while answers are in work
        self.stop.click(handlers.stop, self.session, None, queue=False, **quiet)
        self.clear.click(clear, self.session, [*views, self.passage], **quiet)
        self.conversation.cite(cite, self.session, self.passage, **quiet)
        self.passage.close(_close, self.session, self.passage, **quiet)

    def _wire_sources(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        views = [self.dropzone, self.table, self.conversation]
        received = Path(gr.utils.get_upload_folder())

        def upload(session: Session, event: gr.EventData) -> Iterator[list[Any]]:
            for view in handlers.upload(
                self.service, session, event.arrived, event.refused, inside=received, examples=self.examples
            ):
                yield _sources_updates(view)

        def remove(session: Session, event: gr.EventData) -> list[Any]:
            return _sources_updates(handlers.remove(self.service, session, event.sources, examples=self.examples))

        def narrow(session: Session, text: str) -> str:
            return handlers.filter_table(self.service, session, text)

        self.dropzone.files(upload, self.session, views, **quiet)
        # not through the queue: it must get through while files are in work
        self.dropzone.halt(handlers.stop_upload, self.session, None, queue=False, **quiet)
        self.table.remove(remove, self.session, views, **quiet)
        self.filter.change(narrow, [self.session, self.filter], self.table, trigger_mode="always_last", **quiet)

    def _wire_embedder(self) -> None:
        # no limit: an open page watches as long as the change takes
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}

        def watch(session: Session) -> Iterator[str]:
            yield from handlers.watch_embedder(self.service, session)

        def change(session: Session) -> Iterator[str]:
            yield from handlers.change_embedder(self.service, session)

        def go_back(session: Session) -> Iterator[str]:
            yield from handlers.change_embedder(self.service, session, rollback=True)

        self.embedder.change_over(change, self.session, self.embedder, **quiet)
        self.embedder.go_back(go_back, self.session, self.embedder, **quiet)
        self.embedder.halt(self.service.stop_change, None, None, queue=False, **quiet)
        # another page or another process may have begun a change
        gr.on([self.app.load, self.sources_tab.select], watch, self.session, self.embedder, **quiet)

    def _wire_language(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        contents = [self.header, self.conversation, self.passage, self.dropzone, self.table, self.embedder]

        def show(session: Session) -> list[Any]:
            return [
                markup.header(session.language),
                handlers.conversation(self.service, session, examples=self.examples),
                handlers.passage(self.service, session),
                handlers.dropzone(session),
                handlers.table(self.service, session),
                handlers.embedder(self.service, session),
            ]

        llm = [component for component, _ in self.texts].index(self.llm)

        def switch(session: Session) -> list[Any]:
            language = handlers.switch_language(session)
            labels = [gr.update(**_strings(keys, language)) for _, keys in self.texts]
            labels[llm].update(choices=handlers.generators(self.service, language))
            return [*labels, *show(session)]

        self.app.load(show, self.session, contents, **quiet)
        self.switch.click(switch, self.session, [*(component for component, _ in self.texts), *contents], **quiet)

    # ------------------------------------------------------------ views to updates

    def _chat_updates(self, view: ChatView, session: Session) -> list[Any]:
        """Updates for conversation, live, send, stop, clear, question."""
        if view.warning:
            # Gradio shows the message as HTML
            gr.Warning(escape(view.warning), title=tr("notice", session.language))
        running = view.running
        return [
            _or_skip(view.conversation),
            _or_skip(view.live),
            gr.skip() if running is None else gr.update(visible=not running),
            gr.skip() if running is None else gr.update(visible=running),
            gr.skip() if running is None else gr.update(interactive=not running),
            _or_skip(view.question),
        ]


def _strings(keys: dict[str, str], language: Language) -> dict[str, Any]:
    """The properties of a component that hold a string of the table, in a language."""
    return {name: tr(key, language) for name, key in keys.items()}


def _sources_updates(view: SourcesView) -> list[Any]:
    """Updates for dropzone, table, conversation."""
    return [_or_skip(view.dropzone), _or_skip(view.table), _or_skip(view.conversation)]


def _example(event: gr.EventData) -> str:
    return str(event.question)


def _close(session: Session) -> str:
    handlers.close_passage(session)
    return ""


def _or_skip(value: str | None) -> Any:
    return gr.skip() if value is None else value
