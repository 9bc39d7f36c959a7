"""The engine: what a request says does not depend on others; joining, leaving, cancelling, failing."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chains.chatglm3.engine import Delivered, Finish, GenerationEngine, Request, can_be_batched
from chains.chatglm3.loading import ModelOptions, load_causal_model
from chains.chatglm3.sampling import Sampling, choose

torch = pytest.importorskip("torch", reason="needs the extra [models]")
transformers = pytest.importorskip("transformers", reason="needs the extra [models]")

CONTEXT = 256


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load_causal_model(ModelOptions(tiny, dtype="float32", device="cpu"))


def engine_of(model: Any, **options: Any) -> GenerationEngine:
    return GenerationEngine(model, **{"stop_ids": [], "context": CONTEXT, **options})


class Client:
    """Collects what one request is given."""

    def __init__(self, engine: GenerationEngine, ids: list[int], **sampling: Any) -> None:
        self.items: queue.SimpleQueue[Delivered] = queue.SimpleQueue()
        self.tokens: list[int] = []
        self.request = Request(ids, Sampling(**{"max_new_tokens": 10, **sampling}), self.items.put)
        engine.submit(self.request)

    def next(self) -> Delivered:
        return self.items.get(timeout=30)

    def end(self) -> Finish | Exception:
        while isinstance(item := self.next(), int):
            self.tokens.append(item)
        return item


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    chance = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, longest, (count,), generator=chance).tolist()
    return [torch.randint(3, 600, (length,), generator=chance).tolist() for length in lengths]


def answers(engine: GenerationEngine, ids: list[list[int]], *, together: bool, **sampling: Any) -> list[list[int]]:
    if not together:
        return [answers(engine, [each], together=True, **sampling)[0] for each in ids]
    clients = [Client(engine, each, **sampling) for each in ids]
    for client in clients:
        assert client.end() == Finish("length")
    return [client.tokens for client in clients]


def test_greedy_answers_are_those_of_transformers_generate(model: Any) -> None:
    ids = prompts(3)
    generated = [
        model.generate(torch.tensor([each]), max_new_tokens=10, do_sample=False, eos_token_id=None)[
            0, len(each) :
        ].tolist()
        for each in ids
    ]
    assert answers(engine_of(model), ids, together=True) == generated


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_sixteen_together_say_what_each_says_alone(model: Any, sampling: dict[str, Any]) -> None:
    """Prompts of 1 to 60 tokens: padded on the left, joined and cut again."""
    engine, ids = engine_of(model), prompts(16)
    assert answers(engine, ids, together=True, **sampling) == answers(engine, ids, together=False, **sampling)


def test_a_request_joins_and_leaves_while_others_run(model: Any) -> None:
    engine, ids = engine_of(model), prompts(2)
    alone = answers(engine, ids, together=False, max_new_tokens=40)
    given: dict[str, list[int]] = {"long": [], "short": []}
    ends: list[str] = []
    done = threading.Event()

    def deliver(who: str, item: Delivered) -> None:
        if isinstance(item, int):
            given[who].append(item)
            if given == {"long": [item], "short": []}:  # in the engine's thread: the long one has just begun
                engine.submit(Request(ids[1], Sampling(max_new_tokens=5), lambda item: deliver("short", item)))
            return
        ends.append(who)
        if len(ends) == 2:
            done.set()

    engine.submit(Request(ids[0], Sampling(max_new_tokens=40), lambda item: deliver("long", item)))
    assert done.wait(30)
    assert ends == ["short", "long"]
    assert given == {"long": alone[0], "short": alone[1][:5]}


def test_tokens_of_a_request_come_in_order(model: Any) -> None:
    engine, ids = engine_of(model), prompts(16)
    expected = answers(engine, ids, together=False)
    received: list[list[int]] = [[] for _ in ids]

    def read(place: int) -> None:
        client = Client(engine, ids[place])
        client.end()
        received[place] = client.tokens

    threads = [threading.Thread(target=read, args=(place,)) for place in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert received == expected


def test_those_who_wait_get_their_turn_in_order(model: Any) -> None:
    engine = engine_of(model, max_rows=1)
    order: list[int] = []
    done = threading.Event()

    def deliver(place: int, item: Delivered) -> None:
        if isinstance(item, Finish):
            order.append(place)
            if len(order) == 5:
                done.set()

    for place, ids in enumerate(prompts(5)):
        engine.submit(Request(ids, Sampling(max_new_tokens=3), lambda item, place=place: deliver(place, item)))
    assert done.wait(30)
    assert order == [0, 1, 2, 3, 4]


def test_a_cancelled_request_gets_no_further_token_and_frees_its_place(model: Any) -> None:
    engine = engine_of(model, max_rows=1)
    tokens: list[Delivered] = []
    cancelled = threading.Event()

    def deliver(item: Delivered) -> None:
        tokens.append(item)
        if len(tokens) == 3:
            request.cancel()
        if isinstance(item, Finish):
            cancelled.set()

    request = Request(prompts(1)[0], Sampling(max_new_tokens=200), deliver)
    engine.submit(request)
    waiting = Client(engine, prompts(2)[1])
    assert cancelled.wait(30)
    assert tokens[3:] == [Finish("cancelled")], "no token after the one in progress"
    assert waiting.end() == Finish("length")


def test_a_request_cancelled_while_it_waits_is_never_read(model: Any) -> None:
    engine = engine_of(model, max_rows=1)
    running = Client(engine, prompts(1)[0])
    items: queue.SimpleQueue[Delivered] = queue.SimpleQueue()
    waiting = Request(prompts(2)[1], Sampling(), items.put)
    waiting.cancel()
    engine.submit(waiting)
    assert items.get(timeout=30) == Finish("cancelled")
    assert items.empty()
    assert running.end() == Finish("length")


class Passes:
    """What the model is asked to compute: the shape of the ids of each forward pass, as (rows, tokens)."""

    def __init__(self, model: Any, then: Callable[[list[tuple[int, int]]], None] = lambda _: None) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.logits: list[Any] = []

        def note(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
            self.shapes.append(tuple(given["input_ids"].shape))
            self.logits.append(output.logits[:, -1])
            then(self.shapes)

        self._hook = model.register_forward_hook(note, with_kwargs=True)

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def test_a_prompt_read_in_pieces_has_the_logits_of_one_read_at_once(model: Any) -> None:
    ids = list(range(3, 53))
    for piece, shapes in ((50, [(1, 50)]), (16, [(1, 16), (1, 16), (1, 16), (1, 2)]), (49, [(1, 49), (1, 1)])):
        with Passes(model) as passes:
            assert Client(engine_of(model, piece=piece), ids, max_new_tokens=1).end() == Finish("length")
        assert passes.shapes == shapes
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert (passes.logits[-1][0] - expected).abs().max() <= 1e-5


def test_while_a_long_prompt_is_read_every_running_answer_gets_a_token_a_piece(model: Any) -> None:
    engine, (first, *_), long = engine_of(model, piece=8), prompts(1), list(range(3, 63))
    alone = answers(engine_of(model), [first, long], together=False, max_new_tokens=30)
    running, arriving = [], []
    done = threading.Event()

    def arrive(item: Delivered) -> None:
        arriving.append(item)

    def run(item: Delivered) -> None:
        if not running:  # in the engine's thread: the answer has just begun
            engine.submit(Request(long, Sampling(max_new_tokens=5), arrive))
        running.append(item)
        if isinstance(item, Finish):
            done.set()

    with Passes(model) as passes:
        engine.submit(Request(first, Sampling(max_new_tokens=30), run))
        assert done.wait(30)
    pieces = -(-len(first) // 8)
    assert passes.shapes[pieces : pieces + 17] == [(1, 1), *[(1, 8), (1, 1)] * 7, (1, 4), (2, 1)]
    assert (running[:-1], arriving[:-1]) == (alone[0], alone[1][:5])


def test_a_request_cancelled_while_its_prompt_is_read_is_read_no_further(model: Any) -> None:
    engine = engine_of(model, piece=8, max_rows=1)
    items: queue.SimpleQueue[Delivered] = queue.SimpleQueue()
    request = Request(list(range(3, 63)), Sampling(), items.put)
    with Passes(model, lambda shapes: request.cancel() if len(shapes) == 2 else None) as passes:
        engine.submit(request)
        assert items.get(timeout=30) == Finish("cancelled")
        next_one = Client(engine, prompts(1)[0][:8], max_new_tokens=1)
        assert next_one.end() == Finish("length"), "its place is free"
    assert passes.shapes[:2] == [(1, 8), (1, 8)]
    assert len(passes.shapes) == 3
    assert items.empty()


def test_a_receiver_may_ask_again_as_soon_as_it_hears_that_it_was_cancelled(model: Any) -> None:
    engine = engine_of(model)
    again: list[Client] = []
    heard = threading.Event()

    def deliver(_: Delivered) -> None:
        again.append(Client(engine, prompts(1)[0], max_new_tokens=1))
        heard.set()

    request = Request(prompts(1)[0], Sampling(), deliver)
    request.cancel()
    engine.submit(request)
    assert heard.wait(30)
    assert again[0].end() == Finish("length")


def test_an_answer_ends_at_a_stop_token_which_is_not_given(model: Any) -> None:
    ids = prompts(1)[0]
    said = answers(engine_of(model), [ids], together=True)[0]
    place = said.index(said[7])
    client = Client(engine_of(model, stop_ids=[said[7]]), ids)
    assert client.end() == Finish("stop")
    assert client.tokens == said[:place]


def test_an_answer_ends_where_the_context_is_full(model: Any) -> None:
    client = Client(engine_of(model, context=30), list(range(3, 23)), max_new_tokens=40)
    assert client.end() == Finish("length")
    assert len(client.tokens) == 10


def test_a_prompt_that_fails_is_told_and_the_others_go_on(model: Any) -> None:
    engine = engine_of(model)
    good = Client(engine, prompts(1)[0])
    bad = Client(engine, [10_000_000])  # no such token
    assert isinstance(bad.end(), IndexError)
    assert good.end() == Finish("length")
    assert len(good.tokens) == 10


def test_a_seed_that_torch_refuses_is_told_and_the_others_go_on(model: Any) -> None:
    engine = engine_of(model)
    good = Client(engine, prompts(1)[0])
    bad = Client(engine, prompts(2)[1], seed=2**70)
    assert isinstance(bad.end(), Exception)
    assert good.end() == Finish("length")
    assert Client(engine, prompts(1)[0]).end() == Finish("length")


def test_an_answer_that_fails_midway_leaves_the_others_as_they_are(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good_ids, bad_ids = prompts(2)
    (alone,) = answers(engine_of(model), [good_ids], together=True)

    def choose_or_fail(logits: Any, sampling: Sampling, seen: Any, generator: Any) -> int:
        if sampling.max_new_tokens == 9 and len(seen) == len(bad_ids) + 3:
            raise RuntimeError("probabilities that are no numbers")
        return choose(logits, sampling, seen, generator)

    monkeypatch.setattr("chains.chatglm3.engine.choose", choose_or_fail)
    engine = engine_of(model)
    good, bad = Client(engine, good_ids), Client(engine, bad_ids, max_new_tokens=9)
    assert isinstance(bad.end(), RuntimeError)
    assert len(bad.tokens) == 3
    assert good.end() == Finish("length")
    assert good.tokens == alone


def test_a_batch_that_fails_is_told_to_all_of_it_and_the_next_request_is_answered(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> Any:
        raise RuntimeError("no memory to join two rows")

    engine, joining = engine_of(model), []
    done = threading.Event()

    def join(item: Delivered) -> None:
        joining.append(item)
        if isinstance(item, Exception):
            done.set()

    running: list[Delivered] = []

    def run(item: Delivered) -> None:
        if not running:
            engine.submit(Request(prompts(2)[1], Sampling(), join))
        running.append(item)

    with monkeypatch.context() as patch:
        patch.setattr("chains.chatglm3.engine._joined", no_memory)
        engine.submit(Request(prompts(1)[0], Sampling(max_new_tokens=100), run))
        assert done.wait(30)
    assert isinstance(running[-1], RuntimeError)
    assert Client(engine, prompts(1)[0]).end() == Finish("length")


def test_a_receiver_that_is_gone_does_not_stop_the_others(model: Any) -> None:
    """call_soon_threadsafe raises RuntimeError when its event loop was closed."""

    def gone(item: Delivered) -> None:
        raise RuntimeError("Event loop is closed")

    engine = engine_of(model)
    engine.submit(Request(prompts(1)[0], Sampling(max_new_tokens=200), gone))
    other = Client(engine, prompts(2)[1])
    assert other.end() == Finish("length")
    deadline = time.monotonic() + 30
    while engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.busy == 0


def test_the_thread_ends_when_there_is_nothing_to_do(model: Any) -> None:
    engine = engine_of(model)
    assert Client(engine, prompts(1)[0], max_new_tokens=1).end() == Finish("length")
    thread = engine._thread
    if thread is not None:
        thread.join(30)
    assert engine._thread is None
    assert Client(engine, prompts(1)[0], max_new_tokens=1).end() == Finish("length")


def test_models_with_sliding_windows_take_turns_and_say_what_generate_says() -> None:
    config = transformers.MistralConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.MistralForCausalLM(config).eval()
    assert not can_be_batched(model)
    ids = prompts(3)
    generated = [
        model.generate(torch.tensor([each]), max_new_tokens=10, do_sample=False, eos_token_id=None)[
            0, len(each) :
        ].tolist()
        for each in ids
    ]
    assert answers(engine_of(model), ids, together=True) == generated
