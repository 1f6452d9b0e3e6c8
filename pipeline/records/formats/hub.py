"""A data set of the Hugging Face hub by its id, fetched once into `datasets`' own cache and read there as Arrow files."""

from pipeline.core import RESOURCE, PipelineError, brief


def fetch(name: str, *, split: str, revision: str) -> list[str]:
    """The Arrow files of one split; raises `PipelineError` where `datasets` or the network or the split is missing."""
    try:
        import datasets
    except ImportError:
        raise PipelineError("a data set of the hub needs `datasets`", where=name, remedy="pip install datasets") from None
    try:
        found = datasets.load_dataset(name, split=split or "train", revision=revision or None)
    except Exception as error:  # the hub, the network, the cache and the builders each raise kinds of their own
        raise PipelineError(
            f"cannot be fetched: {brief(error)}",
            where=name,
            remedy="check the id, the split and the network, or download it and name its files",
            code=RESOURCE,
        ) from None
    files = [entry["filename"] for entry in found.cache_files]
    if not files:
        raise PipelineError("has no rows on disk", where=name)
    return files
