"""What a family of language models can do here: each cell of the table in docs/families.md, by running the real thing."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import PATCHES, WIDTH, World
from families import config_of, write_family
from torch.nn import functional as F

from pipeline.check.preflight.models import no_language_model
from pipeline.core.errors import PipelineError
from pipeline.export import check, proof
from pipeline.export.llava import write_model
from pipeline.export.marker import write_marker
from pipeline.export.processor import write_processor
from pipeline.export.proof import HeldOut
from pipeline.export.restore import restore_model
from pipeline.export.source import Source
from pipeline.features.sources import StoredFeatures
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.batches.plan import split_by_tokens
from pipeline.vlm.batches.sharing import Sharing, find_sharing, no_sharing
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.attention import choose_attention, is_plain
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.freezing import freeze
from pipeline.vlm.model.generation import generate
from pipeline.vlm.model.language_model import hidden_size, load_language_model
from pipeline.vlm.model.packed_attention import PACKED
from pipeline.vlm.model.probing import mixes_conversations, require_fit
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

CPU = torch.device("cpu")
YES = "yes"


def load(folder: Path, train: str) -> VisionLanguageModel:
    torch.manual_seed(4)
    language_model = load_language_model(str(folder))
    model = VisionLanguageModel(build_projector("mlp", WIDTH, hidden_size(language_model)), language_model)
    freeze(model, train)
    language_model.set_attn_implementation(choose_attention(language_model, CPU, 512, router_trains=model.router_trains))
    return model


def losses(
    world: World, model: VisionLanguageModel, table: TokenTable, sharing: Sharing, rows: np.ndarray
) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed cross-entropy and its gradients, as training computes them, without a router's own loss."""
    source, total = StoredFeatures(world.store, table), torch.zeros(())
    model.zero_grad()
    for units in split_by_tokens(rows, sharing, 10_000):
        batch = collate(table, units, image_id=world.builder.image_id, tokens=PATCHES, sharing=sharing)
        loss, router = model(batch, source.features(source.load(batch.slots)))
        assert torch.isfinite(router)
        total = total + loss
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(world: World, model: VisionLanguageModel, table: TokenTable, row: int) -> torch.Tensor:
    """The loss of one row the plain way: no padding, no hooks, all logits."""
    found, source = table.row(row), StoredFeatures(world.store, table)
    ids, starts = torch.tensor(found.ids).long()[None], torch.as_tensor(found.image_start).long()
    features = source.features(source.load(np.arange(found.slots.start, found.slots.stop)))
    logits = model.language_model(
        inputs_embeds=model.embed(ids, features, torch.zeros_like(starts), starts), use_cache=False
    ).logits[0]
    wanted = [place for start, end in found.spans for place in range(start, end)]
    return F.cross_entropy(logits[[place - 1 for place in wanted]].float(), ids[0, wanted], reduction="sum")


def trains(world: World, folder: Path, train: str) -> str:
    """Loss and gradients of a padded batch are those of its rows alone; what is frozen has none."""
    model = load(folder, train).train()
    rows = np.array([0, 2, 3, 4, 8])
    loss, gradients = losses(world, model, world.table, no_sharing(world.table.lengths), rows)
    model.zero_grad()
    expected = torch.stack([alone(world, model, world.table, int(row)) for row in rows]).sum()
    expected.backward()
    assert abs(loss - expected.item()) <= 1e-4 * expected.item(), f"loss {loss}, alone {expected.item()}"
    assert gradients["projector.0.weight"].norm() > 0
    same_gradients(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    moved = {name.split(".")[0] for name in gradients}
    assert moved == ({"projector"} if train == "projector" else {"projector", "language_model"}), moved
    return YES


def same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], within: float = 2e-3) -> None:
    assert one.keys() == other.keys()
    largest = max(float(gradient.norm()) for gradient in other.values())
    for name, gradient in other.items():
        error = float((gradient - one[name]).norm()) / max(float(gradient.norm()), 1e-3 * largest)
        assert error < within, f"gradient of {name} off by {error:.1e}"


def shares(world: World, folder: Path, table: TokenTable) -> str:
    """Rows about one picture together: the loss and gradients of rows alone, or refused with the layers' reason."""
    model = load(folder, "all").train()
    if reason := mixes_conversations(model.language_model):
        return f"no: {reason}"
    rows = np.arange(len(table))
    expected, wanted = losses(world, model, table, no_sharing(table.lengths), rows)
    loss, gradients = losses(world, model, table, find_sharing(table), rows)
    assert abs(loss - expected) <= 1e-4 * expected, f"loss {loss}, alone {expected}"
    same_gradients(gradients, wanted)
    return YES


def packs(world: World, folder: Path, table: TokenTable) -> str:
    """Conversations end to end in one row, as on a GPU: the loss of rows alone. Others are padded, which `trains` compares."""
    model = load(folder, "projector").eval()  # a router that trains is not packed
    if not is_plain(model.language_model.config):
        return "padded"
    source, rows, sharing = StoredFeatures(world.store, table), np.arange(len(table)), no_sharing(table.lengths)
    with torch.no_grad():
        expected = sum(float(alone(world, model, table, int(row))) for row in rows)
        model.language_model.set_attn_implementation(PACKED)
        units = list(rows[:, None])
        batch = collate(table, units, image_id=world.builder.image_id, tokens=PATCHES, sharing=sharing, pack=2048)
        loss, _ = model(batch, source.features(source.load(batch.slots)))
    assert abs(float(loss) - expected) <= 1e-4 * expected, f"loss {float(loss)}, alone {expected}"
    return YES


def chats(world: World, folder: Path) -> str:
    """Greedy answers to prompts of two lengths together, with a cache: token by token what each gives alone and without one."""
    model = load(folder, "projector").eval()
    rows = [world.table.row(number) for number in (0, 2, 5)]
    source = StoredFeatures(world.store, world.table)
    prompts = [row.ids[: row.spans[-1][0]] for row in rows]
    slots = [np.arange(row.slots.start, row.slots.stop) for row in rows]
    features = source.features(source.load(np.concatenate(slots)))
    found = generate(model, world.builder, prompts, [row.image_start for row in rows], features, max_new_tokens=8, device=CPU)
    for number, row in enumerate(rows):
        expected = uncached(world, model, prompts[number], row.image_start, source.features(source.load(slots[number])), 8)
        given = found[number].tolist()[: len(expected)]
        assert given == expected, f"answer {number}: {given}, without a cache {expected}"
    return YES


@torch.no_grad()
def uncached(
    world: World, model: VisionLanguageModel, ids: np.ndarray, starts: Any, features: torch.Tensor, count: int
) -> list[int]:
    begin = torch.as_tensor(starts).long()
    embedded = model.embed(torch.from_numpy(ids).long()[None], features, torch.zeros_like(begin), begin)
    said: list[int] = []
    for _ in range(count):
        logits = model.language_model(inputs_embeds=embedded.clone(), use_cache=False).logits[0, -1].float()
        logits[world.builder.suppressed or []] = -torch.inf
        said.append(int(logits.argmax()))
        if said[-1] == world.builder.end_id:
            break
        embedded = torch.cat([embedded, model.language_model.get_input_embeddings()(torch.tensor([said[-1:]]))], 1)
    return said


def exports(world: World, folder: Path, rows: list[HeldOut], work: Path) -> str:
    """Stock Transformers reads the LLaVA folder and gives the pipeline's logits."""
    model = load(folder, "all")
    encoder = world.clip
    vision = {
        "model": encoder.name, "revision": "", "layer": encoder.layer, "precision": encoder.precision, "spec": encoder.spec(),
    }  # fmt: skip
    shape = {"kind": "mlp", "width": encoder.width, "hidden": model.hidden_size}
    manifest = Manifest(vision, {"model": str(folder), "revision": "", "image_token": "<image>"}, shape, own_llm=True)
    checkpoint.save(work / "model", model, manifest, world.builder)
    source = Source.open(work / "model")
    (work / "out").mkdir()
    try:
        write_model(source, work / "out", "float32")
    except PipelineError as error:
        return f"no: {error.what}"
    write_processor(source, work / "out")
    write_marker(work / "out", source.manifest, dtype="float32")
    restore_model(work / "out", work / "back")
    back = Source.open(work / "back")
    exported, _, wrong = check.load(work / "out")
    assert not wrong, wrong[:3]
    for row in rows:
        features = proof.exact_features(source, row.pictures)
        ids, keep, expected = proof.pipeline_logits(source, row.record.turns, features)
        pixels = torch.stack([torch.as_tensor(pixels_of(encoder, data)) for data in row.pictures])
        found = check.logits_of(exported, pixels, ids, keep)
        worst = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        assert worst <= proof.TOLERANCE, f"logits off by {worst:.1e}"
        _, _, again = proof.pipeline_logits(back, row.record.turns, features)
        worst = float((again - expected).abs().max() / expected.abs().max().clamp(min=1))
        assert worst <= proof.TOLERANCE, f"logits of the way back off by {worst:.1e}"
    return YES


def pixels_of(encoder: Any, data: bytes) -> torch.Tensor:
    pixels = torch.from_numpy(encoder.preprocess(data, where="row")).float() * encoder.preprocess.rescale
    return (pixels - torch.tensor(encoder.preprocess.mean).view(3, 1, 1)) / torch.tensor(encoder.preprocess.std).view(3, 1, 1)


@dataclass
class Cells:
    """A row of the table: `yes`, or `no:` and the reason that a user reads before anything is trained."""

    pretrain: str = ""
    sft: str = ""
    sharing: str = ""
    packing: str = ""
    chat: str = ""
    export: str = ""

    @property
    def works(self) -> bool:
        """Whether a family goes from tokens to answers."""
        return self.pretrain == self.sft == self.chat == YES


def cells_of(family: str, folder: Path, world: World, asked: TokenTable, rows: list[HeldOut]) -> Cells:
    """Every cell of one family, made in `folder`; what is neither `yes` nor refused in one line raises."""

    def cell(work: Callable[[], str]) -> str:
        try:
            return work()
        except PipelineError as error:
            return f"no: {error.what}"

    print(family)
    write_family(family, folder, world.builder.tokenizer)
    if reason := no_language_model(config_of(family)):
        return Cells(**dict.fromkeys(asdict(Cells()), f"no: {reason}"))
    fits = cell(lambda: require_fit(load_language_model(str(folder))) or YES)
    if fits != YES:
        return Cells(**dict.fromkeys(asdict(Cells()), fits))
    return Cells(
        pretrain=cell(lambda: trains(world, folder, "projector")),
        sft=cell(lambda: trains(world, folder, "all") and trains(world, folder, "projector+ends")),
        sharing=cell(lambda: shares(world, folder, asked)),
        packing=cell(lambda: packs(world, folder, asked)),
        chat=cell(lambda: chats(world, folder)),
        export=cell(lambda: exports(world, folder, rows, folder / "exported")),
    )
