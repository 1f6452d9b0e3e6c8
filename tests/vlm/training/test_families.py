"""Language models of many families, end to end: what works gives the numbers that it gives alone, what does not is refused first.

`docs/families.md` has the table. After a change on purpose: WRITE_FAMILIES=1 python -m pytest tests/vlm/training/test_families.py
"""

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import World, row
from families import FAMILIES, config_of
from family_cells import YES, Cells, cells_of
from transformers import AutoModelForCausalLM

from pipeline.export.proof import HeldOut, heldout_rows
from pipeline.params.schema import Dataset
from pipeline.text.token_table import TokenTable
from pipeline.vlm.model.probing import logit_factor, mixes_conversations, require_fit, takes_padding
from pipeline.vlm.model.roles import backbone, decoder_layers, output_head

DOC = Path(__file__).parents[3] / "docs" / "families.md"
COLUMNS = ("pretrain", "sft", "sharing", "packing", "chat", "export")
FEW = ("gpt2", "bloom", "granite", "lfm2")  # of each kind one: learned positions, no sdpa, scaled logits, convolutions


@pytest.fixture(scope="module")
def asked(world: World) -> TokenTable:
    """Three questions about one picture, two about another, one without."""
    words = ["cat", "dog here", "what is it now"]
    rows = [row(f"<image>\n{text}?", "Yes. A circle.", "1.png") for text in words]
    rows += [row(f"<image>\n{text}?", "No.", "2.png") for text in words[:2]]
    return world.tokens([*rows, row("Is there a square?", "Yes.")], "asked")


@pytest.fixture(scope="module")
def held(world: World) -> list[HeldOut]:
    return heldout_rows(Dataset(records=str(world.folder / "rows.jsonl"), images=str(world.images.path)), 2)


@pytest.mark.parametrize("family", FEW)
def test_a_family_does_what_the_table_says(
    family: str, world: World, asked: TokenTable, held: list[HeldOut], tmp_path: Path
) -> None:
    found = cells_of(family, tmp_path / family, world, asked, held)
    assert line_of(family, found) in DOC.read_text(encoding="utf-8")
    assert found.works


@pytest.mark.slow
def test_the_table_of_families(world: World, asked: TokenTable, held: list[HeldOut], tmp_path: Path) -> None:
    found = {family: cells_of(family, tmp_path / family, world, asked, held) for family in FAMILIES}
    text = DOC.read_text(encoding="utf-8")
    begin = text.index("| family |")
    table = table_of(found)
    if os.environ.get("WRITE_FAMILIES"):
        DOC.write_text(text[:begin] + table, encoding="utf-8")
    assert text[begin:] == table
    assert len(found) >= 40
    assert sum(cells.works for cells in found.values()) >= 30


def table_of(found: dict[str, Cells]) -> str:
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [line_of(family, cells) for family, cells in found.items() if cells.pretrain == YES]
    lines += ["", "Refused before anything is trained:", "", "| family | why |", "|---|---|"]
    lines += [line_of(family, cells) for family, cells in found.items() if cells.pretrain != YES]
    return "\n".join(lines) + "\n"


def line_of(family: str, cells: Cells) -> str:
    values = asdict(cells)
    if cells.pretrain != YES:
        return f"| {family} | {cells.pretrain.removeprefix('no: ')} |"
    return f"| {family} | {' | '.join(values[name] for name in COLUMNS)} |"


def tiny(family: str, dtype: torch.dtype = torch.float32) -> AutoModelForCausalLM:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "reason"),
    [("llama", ""), ("gpt2", ""), ("lfm2", "pass on"), ("falcon_h1", "pass on"), ("bloom", "no mask"), ("mpt", "count places")],
)
def test_layers_are_asked_whether_they_keep_conversations_apart(family: str, reason: str, dtype: torch.dtype) -> None:
    """In bfloat16, too, as frozen weights are held: rounding is told from a leak."""
    found = mixes_conversations(tiny(family, dtype))
    assert reason in found
    assert bool(found) == bool(reason)


def test_asking_leaves_random_numbers_and_mode_alone() -> None:
    model = tiny("llama").train()
    before = torch.get_rng_state()
    require_fit(model)
    assert mixes_conversations(model) == ""
    assert takes_padding(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize(
    ("family", "factor"), [("llama", 1), ("granite", 0.125), ("cohere", 0.0625), ("minicpm3", 0.25), ("gemma2", None), ("bloom", 1)]
)
def test_what_a_family_does_to_its_logits_is_found_out(family: str, factor: float | None) -> None:
    assert logit_factor(tiny(family)) == factor


@pytest.mark.parametrize("family", ["gpt2", "gptj", "bloom", "mpt", "opt", "gpt_neox", "modernbert-decoder", "llama4_text"])
def test_parts_are_found_by_role(family: str) -> None:
    model = tiny(family)
    assert len(decoder_layers(model)) == model.config.get_text_config().num_hidden_layers
    assert output_head(model).out_features == model.config.vocab_size
    states = backbone(model)(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size)).last_hidden_state
    assert states.shape == (1, 3, model.config.hidden_size)
