"""Packed attention, compiled on a GPU: the loss and gradients of padded rows and of each row alone, in few kernels.

A CPU runs the same comparisons with torch's reference of FlexAttention, so that their mathematics is known to hold.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HIDDEN, ROWS, World
from gpu_device import CLOSE, CLOSE_GRADIENT, DEVICE, ON_GPU, fresh_kernels, needs_gpu, run_on  # noqa: F401
from test_loop import SCHEDULE
from test_packing import assert_same, backward_on_cpu, losses  # noqa: F401
from test_sharing import asked  # noqa: F401
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.loader import plan_micro_batches
from pipeline.vlm.batches.packing import LENGTHS, packed_length, row_budget
from pipeline.vlm.batches.plan import pack_by_tokens, split_by_tokens
from pipeline.vlm.batches.schedule import Execution
from pipeline.vlm.batches.sharing import find_sharing, no_sharing
from pipeline.vlm.model.attention import choose_attention
from pipeline.vlm.model.packed_attention import PACKED, block_mask, packed_attention

HEADS = [(16, 1), (64, 3), (96, 4), (128, 1), (128, 4)]  # a head's width, query heads for each head of keys


def kernels() -> int:
    """Programs that have been compiled since the test began; with `packed_attention` alone compiled, its kernels."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory, world: World) -> dict[tuple[int, int], Path]:
    """A Qwen3 for each of `HEADS`, with two heads of keys."""
    found = {}
    for width, share in HEADS:
        found[width, share] = tmp_path_factory.mktemp("heads")
        torch.manual_seed(width + share)
        config = Qwen3Config(
            vocab_size=len(world.builder.tokenizer), hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, head_dim=width,
            num_attention_heads=2 * share, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
            initializer_range=0.2, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(found[width, share])
    return found


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize(("width", "share"), HEADS)
def test_packed_is_padded_is_each_row_alone(world: World, llms: dict[tuple[int, int], Path], width: int, share: int) -> None:
    """Loss, and gradients of every weight, for text alone, several pictures a row and several turns; a kernel a length."""
    table, rows, each = world.table, np.arange(len(world.table)), no_sharing(world.table.lengths)
    llm = llms[width, share]
    parts = pack_by_tokens(rows, each, 512)
    assert len(parts) > 1
    packed = losses(world, table, each, parts, attention=PACKED, pack=512, llm=llm, device=DEVICE)
    lengths = {packed_length(int(table.lengths[np.concatenate(part)].sum()), 512) for part in parts}
    assert kernels() == len(lengths) or not ON_GPU
    wide = split_by_tokens(rows, each, 10_000)
    padded = losses(world, table, each, wide, attention="sdpa", pack=0, llm=llm, device=DEVICE)
    alone = losses(world, table, each, [[rows[n : n + 1]] for n in rows], attention="sdpa", pack=0, llm=llm, device=DEVICE)
    assert_same(packed, alone, loss=CLOSE, gradient=CLOSE_GRADIENT)
    assert_same(padded, alone, loss=CLOSE, gradient=CLOSE_GRADIENT)


@pytest.mark.usefixtures("backward_on_cpu")
def test_shared_pictures_and_packing_together_are_each_row_alone(
    world: World, asked: TokenTable, llms: dict[tuple[int, int], Path]
) -> None:
    """Rows about one picture hold it once: loss and gradients stay those of rows that hold it each."""
    rows, sharing, each, llm = np.arange(len(asked)), find_sharing(asked), no_sharing(asked.lengths), llms[64, 3]
    parts = pack_by_tokens(rows, sharing, 512)
    assert max(len(unit) for part in parts for unit in part) == 5
    packed = losses(world, asked, sharing, parts, attention=PACKED, pack=512, llm=llm, device=DEVICE)
    alone = losses(world, asked, each, [[rows[n : n + 1]] for n in rows], attention="sdpa", pack=0, llm=llm, device=DEVICE)
    assert_same(packed, alone, loss=CLOSE, gradient=CLOSE_GRADIENT)


@needs_gpu
def test_a_gpu_packs_a_family_that_can_be_packed(world: World) -> None:
    """Or the comparisons of this file would be of what no run uses."""
    assert choose_attention(world.model("all").language_model, DEVICE, 512) == PACKED


@pytest.fixture(scope="module")
def uneven(world: World) -> TokenTable:
    """Rows with none to four pictures, many times over: steps of very different sizes."""
    return world.tokens(ROWS * 4, "uneven")


LARGE_STEPS = replace(SCHEDULE, batch_size=12)


@needs_gpu
@pytest.mark.parametrize("what", ["projector", "all"])
def test_a_run_compiles_a_kernel_for_each_length_and_no_more(world: World, uneven: TokenTable, what: str) -> None:
    """As many kernels as packed rows have lengths, at most `LENGTHS`; one more would fail, since fallbacks are forbidden."""
    budget = row_budget(uneven.lengths, LARGE_STEPS.batch_size, LARGE_STEPS.micro_tokens)
    lengths = {
        packed_length(int(uneven.lengths[np.concatenate(micro.units)].sum()), budget)
        for epoch in range(LARGE_STEPS.epochs)
        for micro in plan_micro_batches(uneven, LARGE_STEPS, epoch, packed=True)
    }
    assert 1 < len(lengths) <= LENGTHS
    packed = run_on(world, world.model(what), LARGE_STEPS, table=uneven, execution=Execution(packed=True))
    assert kernels() == len(lengths)
    padded = run_on(world, world.model(what), LARGE_STEPS, table=uneven)
    for here, there in zip(padded, packed, strict=True):
        assert there == pytest.approx(here, rel=1e-3)


@needs_gpu
@pytest.mark.slow
def test_compiled_layers_around_packed_rows_train_as_plain_ones_do(world: World, uneven: TokenTable) -> None:
    """The history of a run is the same to rounding, and no program is compiled anew beyond torch's limit."""
    plain = run_on(world, world.model("all"), LARGE_STEPS, table=uneven)
    both = Execution(packed=True, compiled=True)
    compiled = run_on(world, world.model("all"), LARGE_STEPS, table=uneven, execution=both)
    for here, there in zip(plain, compiled, strict=True):
        assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_sdpa_with_the_mask_written_out(dtype: torch.dtype) -> None:
    """A conversation with two branches, a plain one and padding, whose ends fall within blocks and whose middles fill some.

    Outputs and the gradients of queries, keys and values, six heads of queries on two of keys, against float64.
    """
    document = torch.tensor([0] * 768 + [1] * 400 + list(range(2, 114)), dtype=torch.int32, device=DEVICE)[None]
    branch = torch.tensor([0] * 200 + [1] * 200 + [2] * 368 + [0] * 400 + [-1] * 112, dtype=torch.int16, device=DEVICE)[None]
    length, order = document.shape[1], torch.arange(document.shape[1], device=DEVICE)
    seen = (
        (order[:, None] >= order) & (document[0][:, None] == document[0]) & ((branch[0] == 0) | (branch[0][:, None] == branch[0]))
    )
    mask = block_mask(document, branch)
    assert int(mask.full_kv_num_blocks.sum()) > 0, "some blocks are taken whole"
    torch.manual_seed(0)
    given = [torch.randn(1, heads, length, 64, device=DEVICE, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, _ = packed_attention(torch.nn.Module(), *given, mask, scaling=0.1)
    expected = scaled_dot_product_attention(*exact, attn_mask=seen, scale=0.1, enable_gqa=True).transpose(1, 2)
    weights = torch.randn(expected.shape, device=DEVICE, dtype=torch.float64)
    (found.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    assert found.dtype == dtype
    most = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in ((found.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))):
        assert float((one - other).norm() / other.norm()) < most


@needs_gpu
def test_no_scores_of_all_pairs_are_ever_held() -> None:
    """Forward and backward at 16,384 tokens: scores of two heads alone would be 2.1 GB in float32, and are never made."""
    length = 16_384
    document = (torch.arange(length, dtype=torch.int32, device=DEVICE) // 256)[None]
    mask = block_mask(document, torch.zeros_like(document, dtype=torch.int16))
    query, key, value = (torch.randn(1, 2, length, 64, device=DEVICE, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    packed_attention(torch.nn.Module(), query, key, value, mask)[0].sum().backward()
    assert torch.cuda.max_memory_allocated(DEVICE) - before < 0.2e9
