"""Stop strings where a token is more than a character, and what an answer says of its end."""

from __future__ import annotations

import asyncio

from kt_sft.inference.backend import Sampling
from kt_sft.serving.engine import Engine
from kt_sft.serving.text import TextStream
from tests.helpers.fake_chat import FakeChat

WORDS = ("one two three", " END", " four")


def decode(ids):
    return "".join(WORDS[at] for at in ids)


def test_text_ends_before_the_first_of_several_stop_strings_in_one_token():
    stream = TextStream(decode, ("three", "two", "one two t", "hree"))
    assert stream.push(0) == "" and stream.stopped and stream.finish() == ""
    stream = TextStream(decode, ("hree", "wo"))
    assert stream.push(0) == "one t" and stream.stopped


def test_stop_string_over_two_tokens_takes_back_what_was_held():
    stream = TextStream(decode, ("three END",))
    assert [stream.push(0), stream.push(1)] == ["one two ", ""] and stream.stopped
    stream = TextStream(decode, ("three END",))
    assert [stream.push(0), stream.push(2), stream.finish()] == ["one two ", "three four", ""]


class NeverEnds(FakeChat):
    """A model that says `length` whatever ended its answer, as generation does that a stop string ends."""

    def generate(self, *args, **kwargs) -> str:
        super().generate(*args, **kwargs)
        return "length"


def test_an_answer_that_a_stop_string_ended_says_so():
    async def ask(stop: tuple[str, ...]) -> tuple[str, str | None]:
        engine = Engine(NeverEnds(answer="abc def"), slots=1)
        try:
            generation = engine.submit(list(b"x"), Sampling(max_tokens=20, stop=stop))
            return await generation.text(), generation.finish_reason
        finally:
            engine.close()

    assert asyncio.run(ask((" d",))) == ("abc", "stop")
    assert asyncio.run(ask(("zz",))) == ("abc def", "length")
