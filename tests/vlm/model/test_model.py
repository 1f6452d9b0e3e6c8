"""The model: splice against a loop over positions, what trains, and the loss against the plain one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATCHES, World
from torch.nn import functional as F

from pipeline.core.errors import PipelineError
from pipeline.features.sources import StoredFeatures
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.model.freezing import freeze
from pipeline.vlm.model.language_model import load_language_model
from pipeline.vlm.model.projector import PROJECTORS
from pipeline.vlm.model.splice import splice
from pipeline.vlm.model.vlm import VisionLanguageModel

B, T, P, D = 3, 12, 3, 4

# the runs of each row: where its images start
LAYOUTS: dict[str, list[list[int]]] = {
    "no image anywhere": [[], [], []],
    "one image a row": [[2], [5], [1]],
    "image first": [[0], [], [0]],
    "image last": [[T - P], [T - P], []],
    "adjacent images": [[1, 1 + P], [], [0, P]],
    "two images a row": [[0, 8], [2, 6], [4, 9]],
    "text-only rows among others": [[], [4], []],
    "a row that is all images": [[0, P, 2 * P, 3 * P], [3], []],
    "runs in no order": [[6, 0], [9, 3], [5]],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def inputs(layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    places = [(row, start) for row, starts in enumerate(LAYOUTS[layout]) for start in starts]
    row, start = (torch.tensor([place[i] for place in places], dtype=torch.long) for i in (0, 1))
    embeddings = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    features = torch.randn(len(places), P, D, dtype=torch.float64, requires_grad=True)
    return embeddings, features, row, start


def by_hand(embeddings: torch.Tensor, features: torch.Tensor, row: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    rows = [[embeddings[b, t] for t in range(embeddings.shape[1])] for b in range(len(embeddings))]
    for image, (b, first) in enumerate(zip(row.tolist(), start.tolist(), strict=True)):
        for patch in range(features.shape[1]):
            rows[b][first + patch] = features[image, patch]
    return torch.stack([torch.stack(row) for row in rows])


@layouts
def test_splice_equals_a_loop_over_positions_and_so_do_its_gradients(layout: str) -> None:
    embeddings, features, row, start = inputs(layout)
    before = embeddings.detach().clone()
    found, expected = splice(embeddings, features, row, start), by_hand(embeddings, features, row, start)
    assert torch.equal(found, expected)
    assert torch.equal(embeddings, before), "the input stays as it was"
    weights = torch.randn(B, T, D, dtype=torch.float64)
    ours = torch.autograd.grad((found * weights).sum(), (embeddings, features), allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad((expected * weights).sum(), (embeddings, features), allow_unused=True, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_splice_takes_the_number_format_of_the_embeddings() -> None:
    embeddings, features, row, start = inputs("one image a row")
    assert splice(embeddings.bfloat16(), features.float(), row, start).dtype == torch.bfloat16


@pytest.mark.parametrize(("images", "rows", "starts"), [(1, 2, 2), (3, 2, 2), (2, 1, 2), (2, 2, 1), (0, 1, 1), (1, 0, 0)])
def test_splice_refuses_counts_that_do_not_match(images: int, rows: int, starts: int) -> None:
    embeddings, features = torch.zeros(B, T, D), torch.ones(images, P, D)
    with pytest.raises(ValueError, match=rf"{images} images' features for {rows} runs"):
        splice(embeddings, features, torch.zeros(rows, dtype=torch.long), torch.zeros(starts, dtype=torch.long))


@pytest.mark.parametrize(("row", "start"), [(0, T - P + 1), (0, T), (B, 0)])
def test_splice_refuses_a_run_that_leaves_its_row(row: int, start: int) -> None:
    with pytest.raises((ValueError, IndexError)):
        splice(torch.zeros(B, T, D), torch.ones(1, P, D), torch.tensor([row]), torch.tensor([start]))


def trained_parts(model: VisionLanguageModel) -> set[str]:
    """The modules that hold a parameter that trains, layers by number."""
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split("model.layers.")[1].split(".")[0] if ".layers." in name else name.split(".")[0]
            found.add(part if part.isdigit() or part == "projector" else "the rest of the language model")
    return found


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ("projector", {"projector"}),
        ("projector+ends", {"projector", "0", "2"}),
        ("all", {"projector", "0", "1", "2", "the rest of the language model"}),
    ],
)
@pytest.mark.parametrize("before", ["projector", "projector+ends", "all"])
def test_freeze_trains_what_it_says_whatever_was_set_before(world: World, train: str, parts: set[str], before: str) -> None:
    model = world.model(before)
    counts = freeze(model, train)
    assert trained_parts(model) == parts
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["projector"] + counts["language_model"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["projector"] == sum(p.numel() for p in model.projector.parameters())


def loss_of(world: World, model: VisionLanguageModel, rows: list[int]) -> torch.Tensor:
    batch = collate(world.table, np.array(rows), image_id=world.builder.image_id, tokens=PATCHES)
    source = StoredFeatures(world.store, world.table)
    return model(batch, source.features(source.load(batch.slots)))[0]


def plain_loss(world: World, model: VisionLanguageModel, row: int) -> torch.Tensor:
    """One row, full logits, labels of -100 where nothing is supervised, as Transformers would have it."""
    found = world.table.row(row)
    ids = torch.from_numpy(found.ids.astype(np.int64))
    embeddings = model.language_model.get_input_embeddings()(ids)[None].clone()
    source = StoredFeatures(world.store, world.table)
    features = model.projector(source.load(np.array(found.slots, np.int64)).float())
    for start, projected in zip(found.image_start.tolist(), features, strict=True):
        embeddings[0, start : start + PATCHES] = projected
    labels = torch.full_like(ids, -100)
    for start, end in found.spans.tolist():
        labels[start:end] = ids[start:end]
    logits = model.language_model(inputs_embeds=embeddings, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("kind", PROJECTORS)
def test_the_loss_is_the_full_logits_cross_entropy_of_every_row_alone(world: World, kind: str) -> None:
    model, rows = world.model("all", kind=kind), [8, 0, 4, 3, 2]
    expected = sum(plain_loss(world, model, row) for row in rows)
    assert isinstance(expected, torch.Tensor)
    found = loss_of(world, model, rows)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_padding_does_not_change_a_rows_loss(world: World) -> None:
    model = world.model()
    long = int(np.argmax(world.table.lengths))
    for row in (0, 4, 9):
        together = loss_of(world, model, [row, long]) - loss_of(world, model, [long])
        assert together.item() == pytest.approx(loss_of(world, model, [row]).item(), rel=1e-4)


def test_a_batch_without_images_still_trains_a_projector_with_a_zero_gradient(world: World) -> None:
    """Text-only rows may fall together; nothing may crash, and nothing may move."""
    model = world.model("projector")
    loss_of(world, model, [4, 9]).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())


@pytest.mark.parametrize(("train", "counted"), [("projector", False), ("projector+ends", True), ("all", True)])
def test_a_mixtures_router_loss_counts_only_where_the_router_trains(
    world: World, moe_folder: Path, train: str, counted: bool
) -> None:
    model = world.model(train, llm=moe_folder)
    batch = collate(world.table, np.array([0]), image_id=world.builder.image_id, tokens=PATCHES)
    source = StoredFeatures(world.store, world.table)
    features = source.load(batch.slots)
    loss, router = model(batch, features)
    assert (router.item() > 0) == counted
    if counted:
        embeddings = model.embed(batch.ids, features, batch.slot_row, batch.slot_start)
        real = batch.real.long()  # padding is no token that the router chose for
        whole = model.language_model(inputs_embeds=embeddings, attention_mask=real, output_router_logits=True, use_cache=False)
        assert router.item() == pytest.approx(0.5 * whole.aux_loss.item(), rel=1e-5)
        gate = next(p for name, p in model.named_parameters() if "layers.0.mlp.gate" in name)
        assert torch.autograd.grad(router, gate)[0].any()
    assert loss.item() > 0


def test_a_mixtures_router_loss_does_not_count_padding(world: World, moe_folder: Path) -> None:
    model = world.model("all", llm=moe_folder)
    batch = collate(world.table, np.array([9, 8]), image_id=world.builder.image_id, tokens=PATCHES)
    features = StoredFeatures(world.store, world.table).load(batch.slots)
    mask = torch.arange(batch.ids.shape[1]) < torch.from_numpy(world.table.lengths[[9, 8]])[:, None]
    embeddings = model.embed(batch.ids, features, batch.slot_row, batch.slot_start)
    whole = model.language_model(inputs_embeds=embeddings, attention_mask=mask.long(), output_router_logits=True, use_cache=False)
    assert model(batch, features)[1].item() == pytest.approx(0.5 * whole.aux_loss.item(), rel=1e-5)


def test_a_model_without_router_has_no_router_loss(world: World) -> None:
    model = world.model("all")
    batch = collate(world.table, np.array([0]), image_id=world.builder.image_id, tokens=PATCHES)
    assert float(model(batch, StoredFeatures(world.store, world.table).load(batch.slots))[1]) == 0


@pytest.mark.parametrize("kind", ["no folder", "empty folder", "weights cut", "weights missing", "a weight missing"])
def test_a_language_model_that_cannot_be_loaded_whole_is_one_line(tmp_path: Path, llm_folder: Path, kind: str) -> None:
    folder = tmp_path / "llm"
    if kind != "no folder":
        folder.mkdir()
    if kind in ("weights cut", "weights missing", "a weight missing"):
        (folder / "config.json").write_bytes((llm_folder / "config.json").read_bytes())
    weights = folder / "model.safetensors"
    if kind == "weights cut":
        weights.write_bytes((llm_folder / "model.safetensors").read_bytes()[:5000])
    if kind == "a weight missing":
        from safetensors.torch import load_file, save_file

        found = load_file(llm_folder / "model.safetensors")
        del found["model.layers.1.mlp.up_proj.weight"]
        save_file(found, weights, metadata={"format": "pt"})
    with pytest.raises(PipelineError, match=r"llm\.model") as caught:
        load_language_model(str(folder))
    assert len(caught.value.line().splitlines()) == 1
