"""One thing that a check has found."""

from dataclasses import dataclass

from pipeline.core import PipelineError


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault that stops a run, or a note that does not; `where` is the parameter or file, `remedy` what mends it."""

    what: str
    where: str = ""
    remedy: str = ""
    note: bool = False

    @classmethod
    def of(cls, error: PipelineError) -> "Finding":
        return cls(error.what, error.where, error.remedy)

    def line(self) -> str:
        return PipelineError(self.what, where=self.where, remedy=self.remedy).line()
