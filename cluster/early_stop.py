"""When an answer may end though its model goes on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EarlyStopConfig(BaseModel):
    """Heuristics of a class, each off by default. A request turns them off with `"early_stop": false` or `ignore_eos`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repetition: bool = Field(default=False, description="what goes round in circles, exactly or nearly")
    soft_max_tokens: int | None = Field(
        default=None, ge=1, description="beyond so many tokens an answer ends with its sentence or code block"
    )
    complete_above: float | None = Field(
        default=None, gt=0, le=1, description="at a sentence's end, where the model would end with this probability or more"
    )
    complete_min_tokens: int = Field(default=32, ge=1, description="from how many tokens on")
    closing: bool = Field(default=False, description="what was said already, behind a closing phrase (`In summary, ...`)")

    @property
    def enabled(self) -> bool:
        return self.repetition or self.closing or self.soft_max_tokens is not None or self.complete_above is not None
