"""Settings of a request in LLaMA-Factory's chat model, on a tiny model in this process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kt_sft.chat import Sampling
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
