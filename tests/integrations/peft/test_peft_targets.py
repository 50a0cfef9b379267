"""Which layers a LoRA target reaches, and what expert LoRA refuses."""

from __future__ import annotations

import pytest
from peft import AdaLoraConfig, LoraConfig

from kt_sft.errors import ConfigError
from kt_sft.integrations import peft as kt_peft
from tests.helpers import parity, tiny_models

BOTH = {"gate_up_proj", "down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """family -> our model; `prepare_lora_config` leaves it alone."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {}

    def of(family="qwen3_moe"):
        if family not in models:
            models[family] = parity.load_ours(tiny_models.build(family, root / family))
        return models[family]

    return of


def projections(config):
    return {entry.rpartition(".")[2] for entry in config.target_parameters or []}


def lora_layers(model):
    return {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("target", ["all", "all-linear", ["all"]])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_all_reaches_the_experts_and_never_the_router(base, family, target):
    model = kt_peft.get_peft_model(base(family), parity.all_linear(target_modules=target))
    layers = lora_layers(model)
    model.unload()
    sparse = model.config.num_hidden_layers - getattr(model.config, "first_k_dense_replace", 0)
    assert sum(name.endswith((".experts", ".experts.base_layer")) for name in layers) == 2 * sparse
    assert not [name for name in layers if name.endswith((".gate", "lm_head"))]
    attention = {name for name in layers if ".self_attn." in name}
    assert len(attention) == model.config.num_hidden_layers * (5 if family.startswith("deepseek") else 4)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["q_proj"], set()),
        (["q_proj", "experts"], BOTH),
        (["mlp.experts"], BOTH),
        (["gate_up_proj"], {"gate_up_proj"}),
        (["experts.down_proj"], {"down_proj"}),
        (["q_proj", "gate_proj", "up_proj"], {"gate_up_proj"}),  # no dense layer bears these names
        (["q_proj", "down_proj"], {"down_proj"}),
        (r".*\.(q_proj|experts)", BOTH),
        (r".*experts\.\d+\.down_proj", {"down_proj"}),
        (r".*\.[qv]_proj", set()),
    ],
)
def test_names_of_experts(base, target, expected):
    config = kt_peft.prepare_lora_config(base(), parity.all_linear(target_modules=target))
    assert projections(config) == expected
    if isinstance(target, list):
        assert set(config.target_modules) == set(target) & {"q_proj"}


def test_names_of_dense_layers_mean_those_where_they_exist(base):
    target = ["gate_proj", "up_proj", "down_proj"]
    config = kt_peft.prepare_lora_config(base("deepseek_v2"), parity.all_linear(target_modules=target))
    assert config.target_parameters is None
    assert config.target_modules == set(target)


def test_router_named_outright_stays_frozen(base):
    target = ["q_a_proj", "gate"]
    config = kt_peft.prepare_lora_config(base("deepseek_v2"), parity.all_linear(target_modules=target))
    assert config.exclude_modules == {"model.layers.1.mlp.gate", "model.layers.2.mlp.gate"}
    regex = parity.all_linear(target_modules=r".*\.(q_a_proj|gate)", exclude_modules=r".*layers\.0\..*")
    model = kt_peft.get_peft_model(base("deepseek_v2"), regex)
    layers = lora_layers(model)
    model.unload()
    assert layers == {f"base_model.model.model.layers.{i}.self_attn.q_a_proj" for i in (1, 2)}


def test_one_layer_of_experts(base):
    for options in (
        {"target_modules": ["model.layers.1.mlp.experts"]},
        {"target_modules": ["experts"], "layers_to_transform": [1]},
        {"exclude_modules": ["model.layers.0.mlp.experts"]},
    ):
        config = kt_peft.prepare_lora_config(base(), parity.all_linear(**options))
        assert {entry.partition(".mlp")[0] for entry in config.target_parameters} == {"model.layers.1"}, options


def test_switch_overrules_the_target(base):
    config = kt_peft.prepare_lora_config(base(), parity.all_linear(target_modules=["q_proj"]), expert_lora=True)
    assert projections(config) == BOTH
    config = kt_peft.prepare_lora_config(base(), parity.all_linear(), expert_lora=False)
    assert config.target_parameters is None
    assert config.lora_dropout == parity.all_linear().lora_dropout


def test_users_config_is_left_alone_and_preparing_twice_changes_nothing(base):
    mine = parity.all_linear(lora_dropout=0.1)
    once = kt_peft.prepare_lora_config(base("deepseek_v2"), mine)
    assert (mine.target_modules, mine.target_parameters, mine.lora_dropout) == ("all-linear", None, 0.1)
    twice = kt_peft.prepare_lora_config(base("deepseek_v2"), once)
    assert twice.to_dict() == once.to_dict()
    assert twice.adapter_dropout == once.adapter_dropout == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora: expert LoRA does not support it"),
        ({"lora_bias": True}, "lora_bias: expert LoRA does not support it"),
        ({"r": 257}, r"r: expert LoRA needs a rank of 1 to 256, got 257 for model\.layers"),
        ({"rank_pattern": {"mlp.experts.down_proj": 300}}, "got 300 for .*down_proj"),
        ({"target_modules": ["experts"], "layers_to_transform": [9]}, "nothing is left to train"),
        ({"target_parameters": ["mlp.experts.gate_up"]}, "names no parameter of the model; did you mean"),
        ({"modules_to_save": ["mlp"]}, "contains the frozen routed experts"),
        *(
            ({"init_lora_weights": init}, f"init_lora_weights: .* got '{init}'")
            for init in ("pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "orthogonal")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refusals_are_one_line_and_come_first(base, options, message):
    config = parity.all_linear()
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        kt_peft.get_peft_model(base(), config)
    assert "\n" not in str(caught.value)
    assert not lora_layers(base())


def test_all_faults_are_listed_at_once(base):
    with pytest.raises(ConfigError) as caught:
        kt_peft.prepare_lora_config(base(), parity.all_linear(use_dora=True, r=400))
    assert len(caught.value.faults) == 2


def test_other_kinds_of_adapters_are_refused(base):
    with pytest.raises(ConfigError, match="expected a plain peft.LoraConfig, got AdaLoraConfig"):
        kt_peft.get_peft_model(base(), AdaLoraConfig(total_step=10, target_modules=["q_proj"]))


def test_dora_without_experts_is_pefts_business(base):
    config = kt_peft.prepare_lora_config(base(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    assert config.use_dora
    assert config.target_parameters is None
