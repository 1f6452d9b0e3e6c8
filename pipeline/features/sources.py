"""Where patch features come from: the store or the live encoder. Training asks either one the same question.

Both return float16 rows, and the live encoder's are rounded as the stored ones are, so the two agree bit for bit.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from pipeline.core import ARTEFACT, PipelineError
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.fused import FusedEncoder
from pipeline.features.store.buffers import BufferPool
from pipeline.features.store.store import FeatureStore
from pipeline.records import Images, digest

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """What a batch needs from the live encoder: `keys` in slot order, rows already `known`, pixels of the `new` ones."""

    keys: list[bytes]
    known: dict[bytes, torch.Tensor]
    new: list[bytes]
    names: list[str]
    pixels: torch.Tensor | None


class ImageSlots(Protocol):
    """Whose images are needed: a token table, by the image slots of all its rows."""

    def image_hashes(self) -> np.ndarray:
        """uint8 [slots, 32]: which image stands in each slot."""
        ...

    def image_names(self) -> Any:
        """string [slots], an Arrow array: the image file's name in each slot."""
        ...


class FeatureSource(Protocol):
    """Answers for numbered image slots, in steps: `announce` and `load` may run ahead in threads."""

    tokens: int
    width: int

    def announce(self, slots: np.ndarray) -> None:
        """Say that slots [S] will be loaded soon; returns at once."""
        ...

    def load(self, slots: np.ndarray) -> Any:
        """Read what slots [S] need; no heavy computation."""
        ...

    def features(self, loaded: Any) -> torch.Tensor:
        """Patch features float16 [S, P, Dv] of the slots that were loaded, in their order, on the device they are computed on."""
        ...

    def stream(self, items: Iterable[tuple[T, Any]]) -> Iterator[tuple[T, torch.Tensor]]:
        """(anything, loaded) -> (the same, features), in order; may look ahead."""
        ...


class StoredFeatures:
    """Features read from the store that `stages.extract` wrote, into memory that is used again and again."""

    def __init__(self, store: FeatureStore, slots: ImageSlots, device: torch.device = CPU) -> None:
        self._store, self.tokens, self.width, self._device = store, store.tokens, store.width, device
        self._rows = store.locate(slots.image_hashes())
        self._pool = BufferPool(store.row_format.shape, store.row_format.dtype, device)
        self._copying: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def announce(self, slots: np.ndarray) -> None:
        self._store.announce(self._rows[slots])

    def load(self, slots: np.ndarray) -> torch.Tensor:
        rows = self._rows[slots]
        stored = self._pool.take(len(rows))
        self._store.announce(rows)  # again: not every caller does so ahead, and unannounced rows come page by page
        self._store.read_into(rows, stored.numpy())
        return stored

    def features(self, loaded: torch.Tensor) -> torch.Tensor:
        return self._store.row_format.decode(self._on_device(loaded))

    def stream(self, items: Iterable[tuple[T, torch.Tensor]]) -> Iterator[tuple[T, torch.Tensor]]:
        return ((item, self.features(loaded)) for item, loaded in items)

    def _on_device(self, stored: torch.Tensor) -> torch.Tensor:
        """Copy while the device computes; the buffer is held until its copy is done, or it would be overwritten under it."""
        if self._device.type != "cuda":
            return stored.to(self._device)
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()
        copied, done = stored.to(self._device, non_blocking=True), torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        self._copying.append((done, stored))
        return copied


class JoinedFeatures:
    """Stored features of several encoders, joined in the channel as they are read: [S, P, the sum of their widths]."""

    def __init__(self, parts: Sequence[StoredFeatures]) -> None:
        self._parts = parts
        self.tokens, self.width = parts[0].tokens, sum(part.width for part in parts)

    def announce(self, slots: np.ndarray) -> None:
        for part in self._parts:
            part.announce(slots)

    def load(self, slots: np.ndarray) -> list[torch.Tensor]:
        return [part.load(slots) for part in self._parts]

    def features(self, loaded: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.features(rows) for part, rows in zip(self._parts, loaded, strict=True)], dim=2)

    def stream(self, items: Iterable[tuple[T, list[torch.Tensor]]]) -> Iterator[tuple[T, torch.Tensor]]:
        return ((item, self.features(loaded)) for item, loaded in items)


def stored_features(stores: Sequence[FeatureStore], slots: ImageSlots, device: torch.device = CPU) -> FeatureSource:
    """Features from the store of each encoder."""
    parts = [StoredFeatures(store, slots, device) for store in stores]
    return parts[0] if len(parts) == 1 else JoinedFeatures(parts)


class LiveFeatures:
    """Features computed from the image files as they are needed.

    They stay on the encoder's device. A picture that stands twice in a batch is encoded once, and one that was seen lately is
    taken from `cache_bytes` of its memory: a row's bits do not depend on its batch, so this changes nothing but the time.
    """

    def __init__(self, encoder: Encoder | FusedEncoder, root: Images, slots: ImageSlots, *, cache_bytes: int = 0) -> None:
        self._encoder, self._root = encoder, root
        self.tokens, self.width = encoder.tokens, encoder.width
        self._names, self._hashes = slots.image_names(), slots.image_hashes()
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._pixels_pool = BufferPool(encoder.pixel_shape, np.dtype(np.uint8), encoder.device)
        self._room = cache_bytes // (encoder.tokens * encoder.width * 2)

    def announce(self, slots: np.ndarray) -> None:
        """Files are read whole by `load`."""

    def load(self, slots: np.ndarray) -> LoadedImages:
        keys = [self._hashes[slot].tobytes() for slot in slots]
        first = dict(zip(reversed(keys), reversed(slots.tolist()), strict=True))
        known = {key: row for key in first if (row := self._kept.get(key)) is not None}
        new = [key for key in first if key not in known]
        names = [self._names[first[key]].as_py() for key in new]
        pixels = [self._pixels(name, key) for name, key in zip(names, new, strict=True)]
        return LoadedImages(keys, known, new, names, torch.from_numpy(np.stack(pixels)) if pixels else None)

    def features(self, loaded: LoadedImages) -> torch.Tensor:
        return next(self.stream([(None, loaded)]))[1]

    def stream(self, items: Iterable[tuple[T, LoadedImages]]) -> Iterator[tuple[T, torch.Tensor]]:
        """Looks ahead until the encoder's batch is full: it computes a whole one however few pictures a step has."""
        waiting: deque[tuple[T, LoadedImages]] = deque()
        wanted: Counter[bytes] = Counter()  # of a picture, how many slots wait
        todo: dict[bytes, tuple[torch.Tensor, str]] = {}
        rows: dict[bytes, torch.Tensor] = {}
        for item, loaded in items:
            waiting.append((item, loaded))
            wanted.update(loaded.keys)
            rows |= loaded.known | {key: self._kept[key] for key in loaded.new if key in self._kept}
            fresh = zip(loaded.new, loaded.pixels if loaded.pixels is not None else (), loaded.names, strict=True)
            todo |= {key: (pixels, name) for key, pixels, name in fresh if key not in rows}
            while len(todo) >= self._encoder.batch:
                self._encode(todo, rows)
            while waiting and all(key in rows for key in waiting[0][1].keys):
                yield self._finished(*waiting.popleft(), rows, wanted)
        if todo:
            self._encode(todo, rows)
        for item, loaded in waiting:
            yield self._finished(item, loaded, rows, wanted)

    def _encode(self, todo: dict[bytes, tuple[torch.Tensor, str]], rows: dict[bytes, torch.Tensor]) -> None:
        """Move the encoder's batch of pictures from `todo` to `rows`."""
        keys = list(islice(todo, self._encoder.batch))
        pixels, names = zip(*(todo.pop(key) for key in keys), strict=True)
        stacked = torch.stack(pixels, out=self._pixels_pool.take(len(pixels)))
        found = self._encoder.encode(stacked, names)  # has read them when it returns
        rows |= zip(keys, (row.clone() for row in found), strict=True)  # a view would hold its whole batch

    def _finished(
        self, item: T, loaded: LoadedImages, rows: dict[bytes, torch.Tensor], wanted: Counter[bytes]
    ) -> tuple[T, torch.Tensor]:
        if not loaded.keys:
            return item, torch.empty(0, self.tokens, self.width, dtype=torch.float16, device=self._encoder.device)
        features = torch.stack([rows[key] for key in loaded.keys])
        wanted.subtract(loaded.keys)
        for key in dict.fromkeys(loaded.keys):
            if self._room:
                self._kept[key] = rows[key]
                self._kept.move_to_end(key)
            if not wanted[key]:
                del wanted[key], rows[key]
        while len(self._kept) > self._room:
            self._kept.popitem(last=False)
        return item, features

    def _pixels(self, name: str, key: bytes) -> np.ndarray:
        where = self._root.place(name)
        data = self._root.read(name)
        if digest(data) != key:
            raise PipelineError("its bytes are not those that were tokenised", where=where, remedy="dvc repro", code=ARTEFACT)
        return self._encoder.preprocess(data, where=where)


class NoFeatures:
    """The blind control: every image is all zeros."""

    def __init__(self, source: FeatureSource) -> None:
        self.tokens, self.width = source.tokens, source.width

    def announce(self, slots: np.ndarray) -> None:
        """Nothing to read."""

    def load(self, slots: np.ndarray) -> torch.Tensor:
        return torch.zeros(len(slots), self.tokens, self.width, dtype=torch.float16)

    def features(self, loaded: torch.Tensor) -> torch.Tensor:
        return loaded

    def stream(self, items: Iterable[tuple[T, torch.Tensor]]) -> Iterator[tuple[T, torch.Tensor]]:
        return iter(items)
