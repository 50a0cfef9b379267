"""Settings of a request in LLaMA-Factory's chat model, on a tiny model in this process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kt_sft.inference.backend import MIN_TEMPERATURE, PromptError, Sampling
from kt_sft.integrations.llamafactory import chat
from tests.helpers import tiny_models

PROMPT = [5, 9, 7, 11]
TOKENS = 8


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    directory = tiny_models.build("mixtral", tmp_path_factory.mktemp("chat"))
    model = tiny_models.load_stock(directory, dtype=torch.float32)
    tokenizer = SimpleNamespace(pad_token_id=0, model_max_length=512)
    template = SimpleNamespace(get_stop_token_ids=lambda tokenizer: [model.config.vocab_size - 1])
    arguments = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "repetition_penalty": 1.0}
    engine = SimpleNamespace(model=model, tokenizer=tokenizer, template=template, generating_args=arguments)
    return chat.LlamaFactoryChat(engine, {"model_name_or_path": str(directory)})


def answer(backend, pause=lambda: None, **settings) -> list[int]:
    tokens: list[int] = []

    def on_token(token: int) -> bool:
        tokens.append(token)
        return False

    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True, **settings)
    assert backend.generate(PROMPT, sampling, on_token=on_token, pause=pause) == "length"
    assert len(tokens) == TOKENS
    return tokens


def greedy(backend) -> list[int]:
    """Of plain transformers."""
    ids = torch.tensor([PROMPT])
    model = backend._model
    out = model.generate(
        inputs=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
        min_new_tokens=TOKENS, pad_token_id=0, eos_token_id=model.config.vocab_size - 1,
    )  # fmt: skip
    return out[0, len(PROMPT) :].tolist()


def test_settings_of_a_request_reach_generation(backend):
    wanted = greedy(backend)
    hot = {"temperature": 5.0, "top_p": 1.0, "seed": 1}
    assert answer(backend, temperature=0.0) == wanted
    assert answer(backend, **hot, top_k=1) == wanted
    assert answer(backend, **hot, top_k=0) != wanted
    assert answer(backend, temperature=5.0, top_p=1e-6, top_k=0, seed=1) == wanted
    assert answer(backend, temperature=1e-4, top_p=1.0, top_k=0, seed=1) == wanted


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-45, 1e-38, 1e-30, 1e-9, MIN_TEMPERATURE, 1e-3])
def test_small_temperatures_take_the_most_likely_token(backend, temperature):
    """Scores divided by 1e-38 are infinite, their probabilities no numbers."""
    for more in ({}, {"top_p": 1.0, "top_k": 0}):
        assert answer(backend, temperature=temperature, seed=1, **more) == greedy(backend)


def test_small_temperature_of_the_configuration_does_too(backend, monkeypatch):
    monkeypatch.setitem(backend._engine.generating_args, "temperature", 1e-40)
    assert answer(backend, seed=1) == greedy(backend)


@pytest.mark.parametrize("penalty", [0.01, 10.0])
def test_penalties_at_their_bounds_are_answered(backend, penalty):
    for temperature in (0.0, MIN_TEMPERATURE, 100.0):
        answer(backend, temperature=temperature, top_p=1e-300, repetition_penalty=penalty, presence_penalty=2.0, seed=1)


def test_thoughts_without_an_end_are_not_searched_for_one(backend, monkeypatch):
    """LLaMA-Factory's pattern would read the rest of the message for each beginning: minutes that stop every thread."""
    template = SimpleNamespace(
        thought_words=("<think>", "</think>"),
        tool_call_words=("<call>", "</call>"),
        encode_oneturn=lambda tokenizer, turns, system, tools: ([len(turns)], []),
    )
    monkeypatch.setattr(backend, "_template", template)
    for begin in ("<think>", "<call>"):
        with pytest.raises(PromptError, match=f"expected each {begin} to be closed, found 20000"):
            backend.encode_chat([{"role": "user", "content": "</think></call>" + begin * 20_000}], None, None)
    closed = "<think>a</think>" * 20_000 + "<call>b</call>" * 20_000 + "<think>" * 10
    assert backend.encode_chat([{"role": "user", "content": closed}], None, None) == [2]


def test_random_numbers_of_a_generation_are_its_own(backend):
    """Whatever draws numbers while it pauses: another answer with a seed of its own, or with none."""
    hot = {"temperature": 5.0, "top_p": 1.0, "top_k": 0}
    alone = answer(backend, **hot, seed=3)
    assert answer(backend, **hot, seed=3) == alone != answer(backend, **hot, seed=4)
    assert answer(backend, lambda: torch.manual_seed(99), **hot, seed=3) == alone
    assert answer(backend, lambda: torch.rand(5), **hot, seed=3) == alone
    torch.manual_seed(0)
    one = answer(backend, **hot)
    torch.manual_seed(0)
    assert answer(backend, **hot) != one, "without a seed nobody knows the answer before"


def test_penalties_are_those_of_openai():
    """Presence once for each token of the answer, frequency for each time; the prompt does not count."""
    presence, frequency = 0.5, 0.25
    (processor,) = chat._penalties(3, Sampling(max_tokens=4, presence_penalty=presence, frequency_penalty=frequency))
    scores = torch.zeros(1, 6)
    found = processor(torch.tensor([[1, 2, 2, 3, 3, 3, 4]]), scores)
    wanted = torch.tensor([[0.0, 0.0, 0.0, -presence - 3 * frequency, -presence - frequency, 0.0]])
    assert torch.equal(found, wanted)
    assert not chat._penalties(3, Sampling(max_tokens=4))
