"""Conversations end to end in one row: the loss and gradients of rows on their own, and nobody sees a neighbour.

A CPU computes FlexAttention by its reference, the forward pass and the backward one; torch refuses the latter there, since
it has no kernel for it. The fixture `backward_on_cpu` lifts that refusal and changes nothing else.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CPU, PATCHES, World, row
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import SCHEDULE
from test_sharing import asked  # noqa: F401
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from pipeline.core.attention import GROUPED
from pipeline.core.errors import PipelineError
from pipeline.features.sources import StoredFeatures
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.collate import Batch, collate
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.loader import plan_micro_batches
from pipeline.vlm.batches.packing import BLOCK, LENGTHS, capacity, packed_length, row_budget
from pipeline.vlm.batches.plan import pack_by_tokens, split_by_tokens
from pipeline.vlm.batches.schedule import Execution
from pipeline.vlm.batches.sharing import Sharing, find_sharing, no_sharing
from pipeline.vlm.evaluation.loss import heldout_loss
from pipeline.vlm.model.attention import can_pack, is_plain
from pipeline.vlm.model.packed_attention import PACKED, block_mask, packed_attention
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.loop import train


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


Found = tuple[float, dict[str, torch.Tensor]]


def losses(
    world: World,
    table: TokenTable,
    sharing: Sharing,
    parts: list[list[np.ndarray]],
    *,
    attention: str,
    pack: int,
    llm: Path | None = None,
    device: torch.device = CPU,
) -> Found:
    model = world.model("all", llm=llm).to(device)
    model.language_model.set_attn_implementation(attention)
    source, total = StoredFeatures(world.store, table, device), torch.zeros((), dtype=torch.float64, device=device)
    for units in parts:
        batch = collate(table, units, image_id=world.builder.image_id, tokens=PATCHES, sharing=sharing, pack=pack)
        assert (batch.document is not None) == bool(pack)
        total = total + model(batch.to(device), source.features(source.load(batch.slots)))[0]
    total.backward()
    return float(total.detach()), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Found, expected: Found, *, loss: float = 1e-6, gradient: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=loss)
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        assert float((wanted - found[1][name]).norm() / wanted.norm().clamp(min=1e-9)) < gradient, name


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize("budget", [10_000, 256])
@pytest.mark.parametrize("which", ["rows", "asked"])
def test_packed_is_padded_is_one_row_at_a_time(
    world: World,
    asked: TokenTable,  # noqa: F811
    which: str,
    budget: int,
) -> None:
    """Text alone, several pictures a row, several turns; loss to 1e-6, gradients of every weight to 1e-5."""
    table = world.table if which == "rows" else asked
    rows, each = np.arange(len(table)), no_sharing(table.lengths)
    packed = pack_by_tokens(rows, each, budget)
    assert (len(packed) > 1) == (budget == 256)
    found = losses(world, table, each, packed, attention=PACKED, pack=budget)
    for attention in (GROUPED, "sdpa"):
        padded = losses(world, table, each, split_by_tokens(rows, each, 10_000), attention=attention, pack=0)
        single = losses(world, table, each, [[rows[n : n + 1]] for n in rows], attention=attention, pack=0)
        assert_same(found, single)
        assert_same(padded, single)


@pytest.mark.usefixtures("backward_on_cpu")
def test_shared_pictures_and_packing_together_change_nothing(world: World, asked: TokenTable) -> None:  # noqa: F811
    rows, sharing, each = np.arange(len(asked)), find_sharing(asked), no_sharing(asked.lengths)
    parts = pack_by_tokens(rows, sharing, 10_000)
    assert sorted(len(unit) for unit in parts[0]) == [1, 1, 2, 3, 5]
    found = losses(world, asked, sharing, parts, attention=PACKED, pack=10_000)
    single = losses(world, asked, each, [[rows[n : n + 1]] for n in rows], attention="sdpa", pack=0)
    assert_same(found, single)


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("what", ["projector", "all"])
def test_a_run_that_packs_ends_where_one_that_pads_does(
    world: World,
    asked: TokenTable,  # noqa: F811
    what: str,
    shared: bool,
) -> None:
    """History, weights and held-out loss (which is sdpa in both) after several steps of several micro-batches."""
    accelerator, runs = Accelerator(mixed_precision="no", cpu=True), []
    sharing = find_sharing(asked) if shared else None
    schedule = replace(SCHEDULE, batch_size=7, micro_tokens=256)
    for packed in (False, True):
        model, source = world.model(what), StoredFeatures(world.store, asked)
        model.language_model.set_attn_implementation(PACKED if packed else "sdpa")
        examples = Examples(asked, source, world.builder.image_id, sharing)
        history = train(model, examples, schedule, accelerator, execution=Execution(packed=packed))
        loss = heldout_loss(model, examples, accelerator, micro_tokens=500)
        runs.append((history, loss, model.state_dict()))
    (padded, loss, weights), (packed_, packed_loss, packed_weights) = runs
    for here, there in zip(padded, packed_, strict=True):
        assert there == pytest.approx(here, rel=1e-5)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, weight in weights.items():
        assert float((weight - packed_weights[name]).norm() / weight.norm().clamp(min=1e-12)) < 1e-4, name


@pytest.mark.usefixtures("backward_on_cpu")
def test_in_bfloat16_packing_is_as_close_to_float32_as_padding_is(world: World) -> None:
    """Autocast does not reach the kernel: queries and keys that are float32 after rotation are rounded as values were."""
    table, rows, each = world.table, np.arange(len(world.table)), no_sharing(world.table.lengths)
    exact, gradients = losses(world, table, each, split_by_tokens(rows, each, 10_000), attention="sdpa", pack=0)
    errors = []
    for attention, pack in (("sdpa", 0), (PACKED, 10_000)):
        parts = (pack_by_tokens if pack else split_by_tokens)(rows, each, 10_000)
        with torch.autocast("cpu", torch.bfloat16):
            loss, found = losses(world, table, each, parts, attention=attention, pack=pack)
        assert loss == pytest.approx(exact, rel=0.02)
        errors.append(sum(float((found[name] - gradients[name]).norm()) for name in found))
    assert errors[1] < 1.5 * errors[0]


@torch.no_grad()
def test_queries_and_keys_take_the_number_format_of_the_values() -> None:
    """As a kernel for a GPU wants them; the reference here would take any."""
    torch.manual_seed(0)
    document = torch.zeros(1, BLOCK, dtype=torch.int32)
    mask, module = block_mask(document, document.to(torch.int16)), torch.nn.Module()
    query, key, value = (torch.randn(1, heads, BLOCK, 16) for heads in (4, 2, 2))
    found, _ = packed_attention(module, query, key, value.bfloat16(), mask)
    same, _ = packed_attention(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
    assert found.dtype == torch.bfloat16
    assert found.shape == (1, BLOCK, 4, 16)
    assert torch.equal(found, same)


def packed_batch(world: World, table: TokenTable, sharing: Sharing, units: list[np.ndarray]) -> Batch:
    return collate(table, units, image_id=world.builder.image_id, tokens=PATCHES, sharing=sharing, pack=512)


def hidden(model: VisionLanguageModel, batch: Batch, source: StoredFeatures) -> torch.Tensor:
    assert batch.document is not None
    assert batch.branch is not None
    features = source.features(source.load(batch.slots))
    embeddings = model.embed(batch.ids, features, batch.slot_row, batch.slot_start)
    mask = block_mask(batch.document, batch.branch)
    decoder = model.language_model.get_decoder()
    return decoder(inputs_embeds=embeddings, attention_mask=mask, position_ids=batch.position, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def test_other_words_in_one_conversation_leave_all_others_as_they_were(world: World, asked: TokenTable) -> None:  # noqa: F811
    """Bit for bit, its neighbours to both sides, the shared picture before it and its sisters; the padding too."""
    sharing, source, model = find_sharing(asked), StoredFeatures(world.store, asked), world.model("all")
    model.language_model.set_attn_implementation(PACKED)
    batch = packed_batch(world, asked, sharing, sharing.units(np.arange(len(asked))))
    assert batch.document is not None
    assert batch.branch is not None
    mine = (batch.document[0] == 1) & (batch.branch[0] == 2)
    assert 0 < int(mine.sum()) < 20
    ids = batch.ids.clone()
    ids[0, mine] = (ids[0, mine] + 1) % 50
    states = [hidden(model, replace(batch, ids=found), source) for found in (batch.ids, ids)]
    assert torch.equal(states[0][~mine], states[1][~mine])
    assert not torch.isclose(states[0][mine], states[1][mine]).all(1).any()


def test_a_packed_row_holds_its_conversations_end_to_end(world: World) -> None:
    table, rows = world.table, [8, 0, 4, 3]
    batch = packed_batch(world, table, no_sharing(table.lengths), [np.array([number]) for number in rows])
    padded = collate(table, np.array(rows), image_id=world.builder.image_id, tokens=PATCHES)
    assert batch.document is not None
    assert batch.position is not None
    assert batch.ids.shape == (1, packed_length(int(table.lengths[rows].sum()), 512))
    start = 0
    for place, number in enumerate(rows):
        here = slice(start, start := start + int(table.lengths[number]))
        assert batch.ids[0, here].tolist() == table.row(number).ids.tolist()
        assert batch.position[0, here].tolist() == list(range(int(table.lengths[number])))
        assert set(batch.document[0, here].tolist()) == {place}
        assert torch.equal(batch.loss_mask[0, here], padded.loss_mask[place, : table.lengths[number]])
    assert batch.real[0].tolist() == [True] * start + [False] * (batch.ids.shape[1] - start)
    assert len(set(batch.document[0, start:].tolist())) == batch.ids.shape[1] - start, "padding is nobody's neighbour"
    assert not batch.loss_mask[0, start:].any()
    assert torch.equal(batch.labels, padded.labels)
    assert batch.slots.tolist() == padded.slots.tolist()
    for line, first in zip(batch.slot_row.tolist(), batch.slot_start.tolist(), strict=True):
        assert set(batch.ids[line, first : first + PATCHES].tolist()) == {world.builder.image_id}
    assert all(t.device.type == "meta" for t in (batch.to(torch.device("meta")).document, batch.to(torch.device("meta")).position))


def test_a_picture_that_runs_into_the_next_conversation_is_refused(world: World) -> None:
    """Two rows that begin with their pictures: a run that starts late would find placeholders of its neighbour."""
    table = world.tokens([row("<image>", "Blue.", "3.png"), row("<image>", "Blue.", "3.png")], "neighbours")
    found = table.row(0)
    shifted = replace(found, image_start=np.array([len(found.ids) - 2]))
    fake = SimpleNamespace(
        spec=table.spec, lengths=table.lengths, path=table.path, where=table.where, row=[shifted, table.row(1)].__getitem__
    )
    with pytest.raises(PipelineError, match=r"neighbours\.jsonl:1: .*needs 16 placeholders, found 0"):
        packed_batch(world, fake, no_sharing(table.lengths), [np.array([0]), np.array([1])])  # type: ignore[arg-type]


units_of_lengths = st.lists(
    st.tuples(st.integers(0, 300), st.lists(st.integers(1, 150), min_size=1, max_size=4)), min_size=1, max_size=8
)


@settings(max_examples=30, deadline=None)
@given(units=units_of_lengths, tail=st.integers(0, 300))
def test_blocks_that_are_left_out_hold_nothing_and_whole_ones_everything(units: list[tuple[int, list[int]]], tail: int) -> None:
    """Against the mask of every pair: what a GPU skips or takes without asking, and a CPU's reference would not notice."""
    documents, branches = [], []
    for number, (prefix, tails) in enumerate(units):
        for branch, count in enumerate([prefix, *tails]):
            documents += [number] * count
            branches += [branch] * count
    tail += -(len(documents) + tail) % BLOCK
    documents += range(len(units), len(units) + tail)
    branches += [-1] * tail
    document, branch = torch.tensor([documents], dtype=torch.int32), torch.tensor([branches], dtype=torch.int16)
    mask, length = block_mask(document, branch), len(documents)
    order = torch.arange(length)
    seen = (order[:, None] >= order) & (document[0][:, None] == document[0])
    seen &= (branch[0] == 0) | (branch[0][:, None] == branch[0])
    assert seen.any(1).all(), "who sees nothing has no softmax"
    nought = torch.tensor(0)
    assert torch.equal(mask.mask_mod(nought, nought, order[:, None], order), seen)
    blocks = seen.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)  # [N, N, BLOCK, BLOCK]
    whole = taken(mask.full_kv_num_blocks, mask.full_kv_indices)
    asked_ = taken(mask.kv_num_blocks, mask.kv_indices)
    assert not (whole & asked_).any()
    assert not (whole & ~blocks.flatten(2).all(2)).any()
    assert not (blocks.flatten(2).any(2) & ~whole & ~asked_).any()
    assert torch.equal(whole.T, taken(mask.full_q_num_blocks, mask.full_q_indices))
    assert torch.equal(asked_.T, taken(mask.q_num_blocks, mask.q_indices))


def taken(counts: torch.Tensor | None, indices: torch.Tensor | None) -> torch.Tensor:
    """bool [N, N] of the lists that a block mask holds."""
    assert counts is not None
    assert indices is not None
    assert counts.dtype == indices.dtype == torch.int32
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for line, (count, numbers) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        found[line, numbers[:count]] = True
    return found


def test_work_grows_with_the_conversations_not_with_their_square() -> None:
    """128 conversations of 128 tokens are 128 blocks of 128 × 128, of 16,384 that a dense mask would have."""
    document = torch.arange(128, dtype=torch.int32).repeat_interleave(BLOCK)[None]
    mask = block_mask(document, torch.ones_like(document, dtype=torch.int16))
    assert mask.full_kv_num_blocks is not None
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == 128


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_kernel_is_compiled_once_a_length_and_takes_the_blocks_that_are_listed() -> None:
    """Forward, on the CPU, for which torch has a kernel of that; six query heads on two of keys, as real models have."""
    torch._dynamo.utils.counters.clear()
    attend = torch.compile(flex_attention, dynamic=False)
    for seed, length in enumerate((512, 512, 384, 512)):
        torch.manual_seed(seed)
        document = torch.randint(0, 5 + seed, (1, length), dtype=torch.int32).sort()[0]
        mask = block_mask(document, torch.zeros_like(document, dtype=torch.int16))
        query, key, value = (torch.randn(1, heads, length, 32) for heads in (6, 2, 2))
        found = attend(query, key, value, block_mask=mask, scale=0.1, enable_gqa=True)
        order = torch.arange(length)
        seen = (order[:, None] >= order) & (document[0][:, None] == document[0])
        expected = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.1, enable_gqa=True)
        assert torch.allclose(found, expected, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200), budget=st.integers(1, 5000), ranks=st.integers(1, 3))
def test_packed_micro_batches_lose_no_row_and_stay_within_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    found = np.array(lengths, np.int32)
    rows, most, sizes = np.arange(len(found))[::2], max(budget, BLOCK), set()
    seen: list[int] = []
    for rank in range(ranks):
        parts = pack_by_tokens(rows, no_sharing(found), budget, rank=rank, ranks=ranks)
        for part in parts:
            numbers = np.concatenate(part)
            used = int(found[numbers].sum())
            assert len(part) == 1 or used <= capacity(budget) <= most
            length = packed_length(used, budget)
            assert length >= used
            assert length % BLOCK == 0
            assert length <= most or used > capacity(budget)
            sizes.add(length)
            seen += numbers.tolist()
        assert sum(int(found[np.concatenate(part)].sum()) <= capacity(budget) // 2 for part in parts) <= 1
    assert sorted(seen) == rows.tolist()
    assert len(sizes) <= 2 * LENGTHS + 2


def test_a_row_is_no_longer_than_a_step_can_fill(asked: TokenTable) -> None:  # noqa: F811
    """Small steps under a large budget would be padding for the most part."""
    budget = row_budget(asked.lengths, 4, 1 << 20)
    assert int(np.sort(asked.lengths)[-4:].sum()) <= budget < int(np.sort(asked.lengths)[-4:].sum()) + LENGTHS * BLOCK
    assert row_budget(asked.lengths, 4, 300) == 300
    schedule = replace(SCHEDULE, batch_size=4, micro_tokens=budget)
    assert all(work.parts == 1 for work in plan_micro_batches(asked, schedule, 0, packed=True))


def test_what_is_packed_and_what_is_not() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    assert is_plain(LlamaConfig(**sizes))
    assert is_plain(Qwen2Config(**sizes, use_sliding_window=False))
    assert not is_plain(LlamaConfig(**sizes, attention_dropout=0.1))
    assert not is_plain(LlamaConfig(hidden_size=32, num_attention_heads=4))
    assert not is_plain(Qwen2Config(**sizes, use_sliding_window=True, sliding_window=64))
    assert not is_plain(MistralConfig(**sizes))
    assert not can_pack(LlamaConfig(**sizes), CPU), "padding to neighbours of like length is faster there"


def test_a_router_that_trains_is_never_packed_in_silence(world: World, asked: TokenTable) -> None:  # noqa: F811
    model = world.model("all")
    model.router_trains = True
    batch = packed_batch(world, asked, no_sharing(asked.lengths), [np.array([0])])
    with pytest.raises(ValueError, match="router"):
        model(batch, StoredFeatures(world.store, asked).load(batch.slots))
