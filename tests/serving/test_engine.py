"""Queue, slots, turns, text: the parts between the protocols and the model."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest
from tokenizers import decoders

from kt_sft.inference.backend import Sampling
from kt_sft.serving.engine import Cancelled, Engine
from kt_sft.serving.errors import RequestError
from kt_sft.serving.text import TextStream
from kt_sft.serving.turns import Turns
from tests.helpers.fake_chat import ANSWER, FakeChat, wait_until


def decode(ids):
    return bytes(ids).decode("utf-8", "replace")


def pieces_of(text: str | bytes, stop=()) -> tuple[list[str], bool]:
    stream = TextStream(decode, stop)
    pieces = []
    for token in text.encode() if isinstance(text, str) else text:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


def test_characters_of_several_tokens_come_whole():
    pieces, _ = pieces_of("naïve 🙂 ok")
    assert "".join(pieces) == "naïve 🙂 ok" and "🙂" in pieces and "ï" in pieces


def test_bytes_that_are_no_text_are_not_held_back_for_ever():
    pieces, _ = pieces_of(b"\xf0" * 30)
    assert any(pieces[:10]) and set("".join(pieces)) == {"\N{REPLACEMENT CHARACTER}"}


def test_text_whose_tokens_never_end_with_a_character_comes_whole_and_in_time():
    text = "x" + "字🙂" * 30
    parts = text.encode()
    tokens = [parts[:2], *(parts[at : at + 7] for at in range(2, len(parts), 7))]
    stream = TextStream(lambda ids: b"".join(tokens[at] for at in ids).decode("utf-8", "replace"))
    pieces = [stream.push(at) for at in range(len(tokens))]
    assert "".join([*pieces, stream.finish()]) == text and all(pieces)


def test_bytes_of_a_tokenizer_that_reads_them_in_runs_come_as_characters():
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    text = "字🙂" * 6
    tokens = [f"<0x{byte:02X}>" for byte in text.encode()]
    stream = TextStream(lambda ids: decoder.decode([tokens[at] for at in ids]))
    assert "".join([*(stream.push(at) for at in range(len(tokens))), stream.finish()]) == text


def without_first_space(ids):
    return decode(ids).removeprefix(" ")


@pytest.mark.parametrize(
    ("context", "answer", "expected"),
    [("", " b c", "b c"), ("a", " b c", " b c"), ("a ", " b", " b")],
)
def test_text_keeps_its_first_space_where_it_goes_on(context, answer, expected):
    stream = TextStream(without_first_space, context=context.encode())
    assert "".join([*(stream.push(token) for token in answer.encode()), stream.finish()]) == expected


def test_character_that_began_in_the_context_is_given():
    first, second = "ï".encode()
    stream = TextStream(decode, context=[*b"na", first])
    assert stream.push(second) + stream.push(ord("v")) == "ïv"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("xx", "thr", "two t"), "one ", True),
        ("aab", ("ab",), "a", True),
        ("one tw", ("two",), "one tw", False),
        ("one", ("one",), "", True),
        ("naïve", ("ï",), "na", True),
    ],
)
def test_text_ends_before_a_stop_string(text, stop, expected, stopped):
    pieces, was_stopped = pieces_of(text, stop)
    assert ("".join(pieces), was_stopped) == (expected, stopped)


def test_nothing_of_a_stop_string_is_shown_early():
    stream = TextStream(decode, ("</end>",))
    shown = "".join(stream.push(token) for token in b"x</en")
    assert shown == "x" and stream.finish() == "</en"


def test_turns_come_in_order_of_arrival():
    turns, order = Turns(), []
    ready = threading.Barrier(4)

    def work(name: int) -> None:
        ready.wait()
        for _ in range(50):
            with turns.turn():
                order.append(name)
                time.sleep(0.0005)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    middle = order[20:-20]
    assert all(len(set(middle[i : i + 4])) >= 3 for i in range(len(middle) - 4)), "somebody had several turns in a row"


def run(scenario, chat: FakeChat | None = None, **limits):
    """Run `scenario(engine)` in an event loop; the engine is stopped afterwards."""
    chat = chat or FakeChat()
    engine = Engine(chat, **limits)
    try:
        return asyncio.run(scenario(engine))
    finally:
        chat.gate.set()
        engine.close()
        assert engine.join(30)


def ask(engine: Engine, prompt: str = "x", **sampling):
    return engine.submit(prompt.encode(), Sampling(**{"max_tokens": 100, **sampling}))


def test_answers_of_many_at_a_time_are_those_of_each_alone():
    chat = FakeChat(lambda prompt, sampling: f"{prompt}! " * 6, delay_s=0.0005)

    async def scenario(engine):
        return await asyncio.gather(*(ask(engine, f"question {i}").text() for i in range(12)))

    assert run(scenario, chat, slots=4) == [f"question {i}! " * 6 for i in range(12)]
    assert not chat.overlapped, "two threads were in the model at once"


def test_streams_move_together():
    chat = FakeChat("a" * 40, delay_s=0.002)

    async def scenario(engine):
        first, second = ask(engine), ask(engine)
        await asyncio.gather(first.text(), second.text())
        return first.timing, second.timing

    first, second = run(scenario, chat, slots=2)
    assert second.first_token < first.ended


def test_waiting_requests_are_served_in_order_and_too_many_refused():
    chat = FakeChat("ab")
    chat.gate.clear()

    async def scenario(engine):
        running = ask(engine, "0")
        await asyncio.to_thread(wait_until, lambda: engine.counts() == (1, 0))
        waiting = [ask(engine, str(i)) for i in (1, 2)]
        with pytest.raises(RequestError, match="try again later") as refused:
            ask(engine, "3")
        assert refused.value.status == 503
        chat.gate.set()
        await asyncio.gather(*(one.text() for one in [running, *waiting]))

    run(scenario, chat, slots=1, max_waiting=2)
    assert chat.prompts == ["0", "1", "2"]


@pytest.mark.parametrize(("slots", "max_waiting"), [(4, 0), (4, 1), (2, 3)])
def test_idle_slots_are_there_for_requests_that_come_at_once(slots, max_waiting):
    chat = FakeChat("ab")
    chat.gate.clear()

    async def scenario(engine):
        taken = [ask(engine) for _ in range(slots + max_waiting)]
        with pytest.raises(RequestError, match="try again later"):
            ask(engine)
        chat.gate.set()
        return await asyncio.gather(*(one.text() for one in taken))

    assert run(scenario, chat, slots=slots, max_waiting=max_waiting) == ["ab"] * (slots + max_waiting)


def test_cancelled_generation_stops_at_the_next_token_and_frees_its_slot():
    chat = FakeChat("a" * 1000, delay_s=0.002)

    async def scenario(engine):
        one = ask(engine, max_tokens=1000)
        async for _ in one:
            break
        one.cancel()
        at_cancel = chat.num_tokens
        await asyncio.to_thread(wait_until, lambda: engine.counts() == (0, 0))
        assert chat.num_tokens <= at_cancel + 2
        return await ask(engine, max_tokens=5).text()

    assert run(scenario, chat, slots=1) == "aaaaa"


def test_cancelled_in_the_queue_never_starts():
    chat = FakeChat("ab")
    chat.gate.clear()

    async def scenario(engine):
        first = ask(engine, "first")
        await asyncio.to_thread(wait_until, lambda: engine.counts() == (1, 0))
        second = ask(engine, "second")
        second.cancel()
        assert engine.counts() == (1, 0)
        chat.gate.set()
        with pytest.raises(Cancelled):
            await second.text()
        await first.text()

    run(scenario, chat, slots=1)
    assert chat.prompts == ["first"]


def test_time_out_ends_the_answer_and_the_computation():
    chat = FakeChat("a" * 10000, delay_s=0.005)

    async def scenario(engine):
        with pytest.raises(RequestError, match="within 0.2 seconds") as error:
            await ask(engine, max_tokens=10000).text()
        assert error.value.status == 504
        await asyncio.to_thread(wait_until, lambda: engine.counts() == (0, 0))

    run(scenario, chat, timeout_s=0.2)


def test_fault_of_the_model_is_the_answer_of_one_request_only():
    chat = FakeChat(fail_at=3)

    async def scenario(engine):
        with pytest.raises(RequestError, match="generation failed: RuntimeError: out of tokens") as error:
            await ask(engine).text()
        assert error.value.status == 500
        chat.fail_at = None
        return await ask(engine).text()

    assert run(scenario, chat, slots=1) == ANSWER


def test_close_ends_running_and_waiting_answers():
    chat = FakeChat("a" * 10000, delay_s=0.002)

    async def scenario(engine):
        answers = [asyncio.ensure_future(ask(engine, max_tokens=10000).text()) for _ in range(3)]
        await asyncio.to_thread(wait_until, lambda: engine.counts() == (2, 1))
        engine.close()
        for answer in answers:
            with pytest.raises(RequestError, match="shutting down"):
                await answer
        with pytest.raises(RequestError, match="shutting down"):
            ask(engine)

    run(scenario, chat, slots=2)


def test_finished_generations_are_not_kept():
    async def scenario(engine):
        kept = []
        for _ in range(5):
            one = ask(engine)
            await one.text()
            kept.append(weakref.ref(one))
            del one
        await asyncio.to_thread(wait_until, lambda: engine.counts() == (0, 0))
        await asyncio.sleep(0.05)
        gc.collect()
        return [ref() for ref in kept]

    assert run(scenario) == [None] * 5


def test_cancelled_generations_that_nobody_reads_are_not_kept():
    async def scenario(engine):
        one = ask(engine)
        kept = weakref.ref(one)
        await asyncio.to_thread(wait_until, lambda: engine.counts() == (0, 0))
        await asyncio.to_thread(one.cancel)
        del one
        await asyncio.sleep(0.05)
        gc.collect()
        return kept()

    assert run(scenario) is None


def test_numbers_of_an_answer():
    async def scenario(engine):
        whole, short = ask(engine, "abc"), ask(engine, max_tokens=4)
        assert (await whole.text(), await short.text()) == (ANSWER, "The ")
        return whole, short

    whole, short = run(scenario)
    assert (whole.finish_reason, whole.completion_tokens) == ("stop", len(ANSWER.encode()))
    assert (short.finish_reason, short.completion_tokens) == ("length", 4)
    timing = whole.timing
    assert timing.arrived <= timing.started <= timing.first_token <= timing.ended


def test_prompts_that_are_made_ready_count_as_waiting():
    engine = Engine(FakeChat(), slots=1, max_waiting=1)
    with engine.place(), engine.place(), pytest.raises(RequestError, match="try again later"), engine.place():
        pytest.fail("there was no place")
    with engine.place():
        pass
    engine.close()
    with pytest.raises(RequestError, match="shutting down"), engine.place():
        pytest.fail("the server stops")
