"""The distinct pictures of data sets, known by the hash of their bytes, in order of first appearance."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import numpy as np
from tqdm import tqdm

from pipeline.core import PipelineError, prefetch
from pipeline.features.decoding import ImageFile
from pipeline.records import ImageError, Images, digest


def distinct_images(
    sources: Iterable[tuple[Images, Iterable[str]] | tuple[Images, Iterable[str], Callable[[bytes], bool]]],
    *,
    threads: int = 1,
    missing: list[PipelineError] | None = None,
) -> tuple[list[ImageFile], np.ndarray]:
    """Distinct images by content, in order of first appearance: files [n] and hashes uint8 [n, 32].

    Args:
        sources: where the images are, their names and, where not all of them count, whether the one of a hash does.
        missing: takes up what is wrong with images that cannot be read; None = the first one is raised.
    """
    files: list[ImageFile] = []
    hashes: list[bytes] = []
    seen: set[bytes] = set()

    def named() -> Iterator[tuple[ImageFile, Callable[[bytes], bool]]]:
        for root, names, *wanted in sources:
            asked: set[str] = set()
            for name in names:
                if name not in asked:
                    asked.add(name)
                    yield ImageFile(root, name), wanted[0] if wanted else bool

    def read(job: tuple[ImageFile, Callable[[bytes], bool]]) -> bytes | PipelineError:
        try:
            return digest(job[0].root.read(job[0].name))
        except ImageError as error:
            return ImageError(error.what, where=error.where, remedy=error.remedy)

    ahead = prefetch(named(), read, depth=4 * threads, threads=threads, where=lambda job: job[0].where)
    with closing(ahead), closing(tqdm(ahead, desc="extract: reading images", unit="image", mininterval=0.5, leave=False)) as done:
        for (file, is_wanted), key in done:
            if isinstance(key, PipelineError):
                if missing is None:
                    raise key
                missing.append(key)
            elif key not in seen and is_wanted(key):
                seen.add(key)
                files.append(file)
                hashes.append(key)
    return files, np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
