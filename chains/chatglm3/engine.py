"""Generation for many at once: one thread per model decodes every running answer in one batch.

A request joins when its prompt has been read and leaves when it ends or is cancelled, without waiting for others
(continuous batching). Prompts are read in pieces, between which every running answer gets its next token. Rows are
padded on the left; what a row says does not depend on its neighbours.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from chains.chatglm3.sampling import Sampling, choose

if TYPE_CHECKING:
    from torch import Generator, Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finish:
    """The last thing a request delivers: why the answer ended."""

    reason: Literal["stop", "length", "cancelled"]
    """a token that ends the turn, `max_new_tokens` or a full context, or `Request.cancel`"""


_PIECE = 512  # tokens of a prompt read at a time: enough to keep a GPU busy

Delivered = int | Finish | Exception
"""ids of the answer one by one, then `Finish`, or what went wrong"""


class Request:
    """One answer that is being generated."""

    def __init__(self, ids: Sequence[int], sampling: Sampling, deliver: Callable[[Delivered], None]) -> None:
        self.ids = list(ids)
        self.sampling = sampling
        self.deliver = deliver
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop generating: nothing is computed after the token or the piece of the prompt in progress.

        The place is free again.
        """
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()


@dataclass
class _Row:
    """A request in the batch, or on its way there."""

    request: Request
    generator: Generator
    answer: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.request.ids) + len(self.answer)


@dataclass
class _Prompt:
    """A row whose prompt is being read."""

    row: _Row
    cache: Any = None
    read: int = 0
    """tokens that the cache holds"""

    @property
    def request(self) -> Request:
        """Whose it is."""
        return self.row.request


class GenerationEngine:
    """Runs requests on one model. The thread lives while there is something to do."""

    def __init__(
        self, model: Any, *, stop_ids: Sequence[int], context: int, max_rows: int = 16, piece: int = _PIECE
    ) -> None:
        """Nothing runs yet.

        Args:
            model: a causal language model of transformers, in evaluation mode.
            stop_ids: tokens that end an answer; they are not delivered.
            context: tokens of prompt and answer together, at most.
            max_rows: requests decoded at a time; further ones wait in the order they came.
            piece: tokens of a prompt that are read at a time.
        """
        self.context = context
        self._model = model
        self._stop_ids = frozenset(stop_ids)
        self._batches = can_be_batched(model)
        if not self._batches and max_rows > 1:
            logger.info("requests take turns: this model's cache cannot be padded")
        self._max_rows = max_rows if self._batches else 1
        self._piece = piece if self._batches else context  # a cache of another kind may not take a prompt in pieces
        self._waiting: deque[Request] = deque()
        self._prompt: _Prompt | None = None
        self._rows: list[_Row] = []
        self._cache = _Cache()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        taken = inspect.signature(_plain(model).forward).parameters
        self._keeps_logits, self._takes_positions = "logits_to_keep" in taken, "position_ids" in taken

    def submit(self, request: Request) -> None:
        """Queue a request; everything else comes through its `deliver`, called in the engine's thread."""
        with self._lock:
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
                self._thread.start()

    @property
    def busy(self) -> int:
        """Requests running or waiting."""
        with self._lock:
            return self._count()

    def _count(self) -> int:
        return len(self._waiting) + len(self._rows) + (self._prompt is not None)

    def _run(self) -> None:
        import torch

        # not inference_mode: what a layer keeps of its inputs must serve training, which may go on afterwards
        with torch.no_grad():
            while True:
                with self._lock:
                    if not self._count():
                        self._thread = None
                        return
                try:
                    self._step()
                except Exception as error:  # whatever it is, those who wait for it must hear of it
                    logger.exception("generation failed")
                    self._fail(error)

    def _step(self) -> None:
        """A piece of one prompt, then a token for every row, so that new prompts hold nobody up long."""
        self._drop([(row, Finish("cancelled")) for row in self._rows if row.request.cancelled])
        prompt = self._prompt_to_read()
        if prompt is not None:
            self._read(prompt)
        if self._rows:
            self._decode()

    def _prompt_to_read(self) -> _Prompt | None:
        """The prompt that is being read, or that of the next request where a place is free; cancelled ones go."""
        gone: list[tuple[Request, Delivered]] = []
        with self._lock:
            if self._prompt is not None and self._prompt.request.cancelled:
                gone.append((self._prompt.request, Finish("cancelled")))
                self._prompt = None
            while self._prompt is None and self._waiting and len(self._rows) < self._max_rows:
                request = self._waiting.popleft()
                if request.cancelled:
                    gone.append((request, Finish("cancelled")))
                    continue
                try:
                    self._prompt = _Prompt(_Row(request, request.sampling.generator()))
                except (RuntimeError, TypeError, ValueError) as error:  # a seed that torch refuses
                    gone.append((request, error))
            prompt = self._prompt
        for request, end in gone:  # without the lock: a receiver may submit its next request at once
            _deliver(request, end)
        return prompt

    def _read(self, prompt: _Prompt) -> None:
        """Read a piece of a prompt; with the last its first token is delivered and its row joins the batch."""
        ended: Finish | Exception | None
        try:
            logits = self._next_piece(prompt)
            if prompt.read < len(prompt.request.ids):
                return
            ended = self._take(prompt.row, logits)
        except Exception as error:  # such as no memory for this prompt: the others go on
            logger.exception("a prompt of %d tokens failed", len(prompt.request.ids))
            ended = error
        with self._lock:
            self._prompt = None
            if ended is None:
                self._rows.append(prompt.row)
        if ended is None:
            self._cache.join(prompt.cache, prompt.read)
        else:
            _deliver(prompt.request, ended)

    def _next_piece(self, prompt: _Prompt) -> Tensor:
        """The logits (vocabulary,) after the next piece of a prompt."""
        import torch

        piece = prompt.request.ids[prompt.read : prompt.read + self._piece]
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        ids = torch.tensor([piece], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=prompt.cache, use_cache=True, **keep)
        prompt.cache, prompt.read = output.past_key_values, prompt.read + len(piece)
        logits: Tensor = output.logits[0, -1]
        return logits

    def _decode(self) -> None:
        import torch

        device = self._model.device
        places = torch.tensor([[row.length - 1] for row in self._rows], device=device)
        output = self._model(
            input_ids=torch.tensor([[row.answer[-1]] for row in self._rows], device=device),
            **({"position_ids": places} if self._takes_positions else {}),
            attention_mask=self._cache.next_mask(device),
            past_key_values=self._cache.values,
            use_cache=True,
        )
        logits = output.logits[:, -1]
        finished = [(row, self._taken(row, scores)) for row, scores in zip(self._rows, logits, strict=True)]
        self._drop([(row, finish) for row, finish in finished if finish is not None])

    def _taken(self, row: _Row, logits: Tensor) -> Finish | Exception | None:
        """As `_take`; an error, such as logits that are no numbers, is how this row ended, and no other."""
        try:
            return self._take(row, logits)
        except Exception as error:
            logger.exception("an answer failed at its token %d", len(row.answer) + 1)
            return error

    def _take(self, row: _Row, logits: Tensor) -> Finish | None:
        """Choose a row's next token and deliver it; how the answer ended, where it did."""
        sampling = row.request.sampling
        token = choose(logits, sampling, [*row.request.ids, *row.answer], row.generator)
        if token in self._stop_ids:
            return Finish("stop")
        row.answer.append(token)
        _deliver(row.request, token)
        if len(row.answer) >= sampling.max_new_tokens or row.length >= self.context:
            return Finish("length")
        return None

    def _drop(self, finished: Sequence[tuple[_Row, Finish | Exception]]) -> None:
        """Take rows out of the batch; they hear of it when their places are free."""
        if not finished:
            return
        gone = {id(row) for row, _ in finished}
        kept = [place for place, row in enumerate(self._rows) if id(row) not in gone]
        self._cache.keep(kept)
        with self._lock:
            self._rows = [self._rows[place] for place in kept]
        for row, finish in finished:
            _deliver(row.request, finish)

    def _fail(self, error: Exception) -> None:
        """Tell everyone in the batch; those who wait get their turn."""
        with self._lock:
            rows, self._rows = self._rows, []
        self._cache = _Cache()
        for row in rows:
            _deliver(row.request, error)


def _deliver(request: Request, item: Delivered) -> None:
    """Hand over a token. A receiver that is gone (its event loop was closed) cancels its request, not the others'."""
    try:
        request.deliver(item)
    except RuntimeError:
        request.cancel()


def _plain(model: Any) -> Any:
    """The model below a PEFT adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def can_be_batched(model: Any) -> bool:
    """Whether every layer keeps all keys and values, so that rows of different length can be padded and joined.

    Sliding windows, state spaces and other caches of their own are right for one row at a time only.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=_plain(model).config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


class _Cache:
    """Keys and values of the rows, padded on the left to the longest.

    Per layer a tensor (rows, heads, tokens, size); `_padding` counts each row's columns that hold nothing.
    """

    def __init__(self) -> None:
        self.values: Any = None
        self._padding: list[int] = []
        self._columns = 0

    def join(self, other: Any, columns: int) -> None:
        """Add a row: the cache of a prompt of so many tokens."""
        if self.values is None:
            self.values, self._padding, self._columns = other, [0], columns
            return
        width = max(self._columns, columns)
        for layer, added in zip(self.values.layers, other.layers, strict=True):
            layer.keys = _joined(layer.keys, added.keys, width)
            layer.values = _joined(layer.values, added.values, width)
        self._padding = [padding + width - self._columns for padding in self._padding] + [width - columns]
        self._columns = width

    def next_mask(self, device: Any) -> Tensor | None:
        """The attention mask of the next step, (rows, tokens + 1); None where nothing is padded."""
        import torch

        self._columns += 1
        if not any(self._padding):
            return None
        columns = torch.arange(self._columns, device=device)
        return (columns >= torch.tensor(self._padding, device=device)[:, None]).long()

    def keep(self, rows: Sequence[int]) -> None:
        """Leave only these rows, and no column that all of them pad."""
        import torch

        if not rows:
            self.values, self._padding, self._columns = None, [], 0
            return
        self._padding = [self._padding[row] for row in rows]
        common = min(self._padding)
        for layer in self.values.layers:
            index = torch.tensor(list(rows), device=layer.keys.device)
            layer.keys = layer.keys[index, :, common:]
            layer.values = layer.values[index, :, common:]
        self._padding = [padding - common for padding in self._padding]
        self._columns -= common


def _joined(one: Tensor, other: Tensor, width: int) -> Tensor:
    import torch
    from torch.nn.functional import pad

    return torch.cat([pad(each, (0, 0, width - each.shape[2], 0)) for each in (one, other)])
