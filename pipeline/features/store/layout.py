"""What a shard's HDF5 may hold. The format can do far more: name other files, compute datasets, unpack gigabytes from bytes."""

import h5py

DATASETS = ("features", "image_sha256", "row_xxh3", "channel_mean", "channel_spread")


def require_plain(file: h5py.File, size: int) -> None:
    """Raises ValueError unless the file of `size` bytes holds the expected datasets only, whole and unpacked, within itself."""
    if len(file) > len(DATASETS):
        raise ValueError(f"holds {len(file):,} things, expected {len(DATASETS)} at most")
    for name in file:
        if name not in DATASETS:
            raise ValueError(f"holds {name!r:.60}, which no shard has")
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"its {name} is a link")
        if file.get(name, getclass=True) is not h5py.Dataset:
            raise ValueError(f"its {name} is no dataset")
        _require_plain_dataset(name, file[name], size)


def _require_plain_dataset(name: str, dataset: h5py.Dataset, size: int) -> None:
    settings = dataset.id.get_create_plist()
    if dataset.external is not None or dataset.is_virtual:
        raise ValueError(f"its {name} is elsewhere")
    if settings.get_layout() != h5py.h5d.CONTIGUOUS or settings.get_nfilters():
        raise ValueError(f"its {name} is packed or in pieces")
    if dataset.dtype.kind not in "fu" or dataset.dtype.hasobject:
        raise ValueError(f"its {name} holds {dataset.dtype}, expected numbers")
    begin, length = dataset.id.get_offset(), dataset.size * dataset.dtype.itemsize
    if length and (begin is None or begin + length > size):
        raise ValueError(f"its {name} has {length:,} bytes, the file {size:,}")
