"""The same steps cut up in several ways by a real trainer of each engine, and memory that runs out on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from bizassist_nb.data.tokens import IGNORED
from bizassist_nb.models import base as models
from bizassist_nb.training.cuda_graphs import CaptureError, Graphs, sizes


@pytest.fixture(scope="module", params=["transformers", "unsloth"])
def found(request, tiny, tmp_path_factory):
    """What `train_fits.py` prints: 10 rows in steps of 4, so that the last has 2."""
    folder = tmp_path_factory.mktemp("fits")
    command = [sys.executable, str(Path(__file__).parents[1] / "train_fits.py"), request.param, str(tiny), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_cutting_steps_up_and_checkpointing_change_nothing_that_is_learned(found):
    assert found["shapes"] == [4, 4, 2]
    assert found["4"]["moved"] > 1e-4
    ways = {name for name, way in found.items() if isinstance(way, dict) and "losses" in way} - {"4", "never"}
    assert ways >= {"sparing", "halved", "from the start"}  # with checkpointing; two rows at once; one, checkpointed
    for other in ways:
        assert found[other]["losses"] == pytest.approx(found["4"]["losses"], rel=1e-5), other
        assert found[other]["tokens"] == found["4"]["tokens"], other  # the same rows a step, and no step twice
        assert found[other]["apart"] < 0.02 * found["4"]["moved"], other


@pytest.mark.slow
def test_checkpointing_only_where_it_is_needed_and_everywhere_once_that_was_too_little(found):
    sparing = found["sparing"]
    assert sparing["checkpointed"] == [True, True, False, True]  # the last step, and that again
    assert [fit[:3] for fit in sparing["fits"]] == [[2, 4, True]]
    assert "memory ran out in a step without checkpointing" in sparing["fits"][0][3]


@pytest.mark.slow
def test_passes_without_checkpointing_go_through_graphs(found):
    if found["engine"]["name"] == "unsloth":
        assert "graphs" not in found
        return
    assert found["graphs"]["through graphs"] == [0, 1, 2]
    assert found["halved graphs"]["through graphs"] == list(range(5))  # the second step fails once, then is two
    assert found["sparing graphs"]["through graphs"] == [2]
    assert found["sparing graphs"]["checkpointed"] == [True, True, False]


@pytest.mark.slow
def test_out_of_memory_goes_on_from_the_same_step_with_half_the_rows(found):
    halved = found["halved"]
    assert halved["done"] == 3
    assert [fit[:3] for fit in halved["fits"]] == [[1, 2, False]]
    assert "memory ran out with 4 rows at once" in halved["fits"][0][3]
    assert "Tried to allocate 2.00 GiB" in halved["fits"][0][3]
    assert halved["checkpoints"] == [1, 3]  # what was done is saved before anything is tried again


@pytest.mark.slow
def test_out_of_memory_in_the_first_step_goes_down_to_checkpointing(found):
    start = found["from the start"]
    assert [fit[:3] for fit in start["fits"]] == [[0, 2, False], [0, 1, False], [0, 1, True]]
    assert "with a single row at once" in start["fits"][2][3]
    assert (start["done"], start["checkpoints"]) == (3, [3])


@pytest.mark.slow
def test_when_nothing_fits_a_shorter_max_length_is_named_and_what_is_done_is_kept(found):
    never = found["never"]
    assert [fit[:3] for fit in never["fits"]] == [[2, 1, False], [2, 1, True]]
    assert "a single row at once and checkpointing on" in never["error"]
    assert "try max_length = " in never["error"]
    assert never["checkpoints"] == [2]
    assert len(never["losses"]) == 2


def random_base(config, folder):
    """That model with random weights, biases too, in NF4 with a random adapter."""
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config)
    for name, parameter in whole.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    whole.save_pretrained(folder)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(models.load_nf4(folder), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


FAMILIES = {
    "biases": Qwen2Config(**SMALL),
    "a sliding window": MistralConfig(**SMALL, sliding_window=5),
    "norms of queries and keys": Qwen3Config(**SMALL, head_dim=16),
    "norms and windows of its own": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=5),
    "one matrix for several": Phi3Config(**SMALL, pad_token_id=0),
    "layers without positions": SmolLM3Config(**SMALL, no_rope_layers=[1, 0], pad_token_id=0),
}


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_rows_end_to_end_have_the_loss_and_the_gradients_of_rows_by_themselves(tmp_path, config, unpacked):
    model = random_base(config, tmp_path)
    lengths, mask = [17, 14], torch.ones(2, 17, dtype=torch.int64)
    ids, labels = torch.randint(1, 300, (2, 17)), torch.randint(0, 300, (2, 17))
    labels[0, :9] = labels[1, 14:] = IGNORED  # the second row's first token has a label, and nothing before it
    mask[1, 14:] = 0
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad(set_to_none=True)
    graphs = Graphs(model, 3, [31, 20], unpacked=unpacked)  # room for a third row, which is not there
    found = graphs(ids, labels, lengths, (labels[:, 1:] != IGNORED).sum())
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    again = graphs(ids[1:], labels[1:], lengths[1:], 1)  # what the pass before left behind is not read
    alone = model(input_ids=ids[1:, :14], labels=labels[1:, :14], use_cache=False).loss * 13
    assert again == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SMALL, logits_scaling=8.0),
        LlamaConfig(**SMALL, attention_dropout=0.1),
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=None),
    ],
    ids=["scaled logits", "dropout", "capped attention"],
)
def test_graphs_are_not_made_of_a_model_that_they_would_compute_otherwise(tmp_path, config):
    model = random_base(config, tmp_path)
    ids = torch.randint(1, 300, (2, 17))
    with pytest.raises(CaptureError):
        Graphs(model, 2, [34], unpacked=False)(ids, ids, [17, 17], 32)


def test_passes_are_captured_where_that_takes_less_time_than_their_padding():
    assert sizes([700]) == [704]
    assert sizes([700, 100, 640]) == [704]  # 668 tokens of padding are sooner computed than a second pass captured
    assert sizes([100] * 200 + [700]) == [128, 704]
    spread = list(range(64, 2048, 16))
    found = sizes(spread)
    assert found[-1] == 2048
    assert 2 < len(found) < 8
    assert not any(size % 64 for size in found)
