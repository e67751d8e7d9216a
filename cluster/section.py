"""What every section of the configuration is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Seconds = Positive
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Base of every section: frozen, and strict about what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
