"""The form of a machine report: what may stand in its file, and within which bounds.

The file has these fields and no others, so nothing can be in it that is not listed here. A text is one of a few words,
or has a short pattern without slashes, so it holds no path. Times are in seconds, sizes in bytes, energy in joules.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ..errors import UsageError
from ..source.ssd_writes import write_beside

SCHEMA_VERSION = 1
FORMAT = "mlx_flash machine report"
MOST_FILE_BYTES = 256 << 10
LOCAL, DEMO = "a local folder", "the packaged demo model"
LONGEST_WORDS = 80
MOST = 2**53  # of whole numbers: all programs read them alike

Words = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_WORDS, pattern=r"^[A-Za-z0-9 .,:()+_-]+$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]
Repository = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
]
Day = Annotated[str, StringConstraints(pattern=r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]$")]
Count = Annotated[int, Field(ge=0, le=MOST)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
BudgetName = Literal["smallest", "middle", "largest"]
State = Literal["cold", "warm"]
Energy = Literal["not available", "process CPU", "processor packages"]
Reason = Literal["time", "memory", "interrupted", "failed"]


class FormPart(BaseModel):
    """Fields that are not listed are refused, and so are numbers written as texts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DiskRate(FormPart):
    """Random reads of the model's largest file, or of a test file: pieces of one size, some on their way at once."""

    piece_bytes: Count
    at_once: Count
    bytes_per_second: Amount


class ReportedMachine(FormPart):
    """What the doctor knows of the machine. A fact that it could not learn is None."""

    system: Words | None = None
    system_version: Words | None = None
    architecture: Words | None = None
    chip: Words | None = None
    model: Words | None = None
    virtual: bool | None = None
    cores: Count | None = None
    performance_cores: Count | None = None
    efficiency_cores: Count | None = None
    gpu_cores: Count | None = None
    memory_bytes: Count | None = None
    free_bytes: Count | None = None
    swap_used_bytes: Count | None = None
    pressure: Name | None = None
    device: Literal["gpu", "cpu"] | None = None
    device_architecture: Words | None = None
    recommended_bytes: Count | None = None
    plugged_in: bool | None = None
    low_power: bool | None = None
    heat: Name | None = None
    file_system: Words | None = None
    network: bool | None = None
    external: bool | None = None
    spinning: bool | None = None
    connection: Words | None = None
    disk: Annotated[list[DiskRate], Field(max_length=40)] = []
    disk_direct: bool | None = None
    disk_cached_share: Share | None = None
    self_tests: Annotated[dict[Name, bool | None], Field(max_length=20)] = {}
    hazards: Annotated[list[Name], Field(max_length=40)] = []
    python: Words | None = None
    packages: Annotated[dict[Name, Words | None], Field(max_length=20)] = {}


class ReportedModel(FormPart):
    """The model by its repository, or by its numbers alone. numbers: whole numbers of its config.json."""

    name: Repository | Literal["a local folder", "the packaged demo model"]
    model_type: Name | None
    numbers: Annotated[dict[Name, Count], Field(max_length=20)]
    units: Words
    layers: Count
    units_per_layer: Count
    unit_bytes: Count
    resident_bytes: Count
    context: Count


class ReportedBudget(FormPart):
    """forecast_*: what was foreseen for a decoded token before the model was loaded; None without a forecast."""

    name: BudgetName
    bytes: Count
    forecast_tokens_per_second: Amount | None
    forecast_bytes_per_token: Count | None


class ReportedAnswer(FormPart):
    """An answer to a prompt. cold: the first one of its process, with empty slots; warm: to the same prompt again.

    Times and bytes beside `prompt_*` and `first_token_s` are means per decoded token, apart from the two percentiles.
    """

    state: State
    generated_tokens: Count
    first_token_s: Amount
    prompt_bytes: Count
    tokens_per_second: Amount | None
    token_median_s: Amount
    token_p90_s: Amount
    hit_rate: Share | None
    bytes_per_token: Amount
    reads_per_token: Amount
    read_s: Amount
    wait_s: Amount
    manage_s: Amount
    compute_s: Amount
    joules: Amount | None
    peak_bytes: Count


class ReportedChoice(FormPart):
    """A choice among ways of reading, and where it comes from. trying: whether it was on trial when the run ended."""

    choice: bool | Count | Literal["direct", "buffered"]
    by: Literal["you", "trial", "default"]
    trying: bool


class ReportedRun(FormPart):
    """A process of its own, within a budget, that answers one prompt cold and warm.

    slot_share: of the units that have a slot. swapped_*, compressed_*, decompressed_*: of the memory of all programs,
    while the process ran; 0 where the system does not count it. choices: after the last answer, see `Trials.choices`.
    """

    budget: BudgetName
    prompt_tokens: Count
    load_s: Amount
    planned_bytes: Count
    slot_share: Share
    swapped_in_bytes: Count
    swapped_out_bytes: Count
    compressed_bytes: Count
    decompressed_bytes: Count
    answers: Annotated[list[ReportedAnswer], Field(min_length=1, max_length=2)]
    choices: dict[Literal["lookahead", "overlap", "io", "threads", "pieces"], ReportedChoice] = {}


class LeftOut(FormPart):
    budget: BudgetName
    prompt_tokens: Count
    state: State
    reason: Reason


class SameText(FormPart):
    """Whether all answers to a prompt have the same token ids, as far as the shortest of them goes (`tokens`).

    first_difference: index of the first token that differs; None if there is none.
    """

    prompt_tokens: Count
    budgets: Count
    answers: Count
    tokens: Count
    same: bool
    first_difference: Count | None


class MachineReport(FormPart):
    """The whole file. energy: what `joules` counts: of this process's CPU time, or of whole processor packages."""

    format: Literal["mlx_flash machine report"] = "mlx_flash machine report"
    schema_version: Literal[1] = 1
    made: Day
    seconds: Amount
    quick: bool
    version: Words
    machine: ReportedMachine | None
    model: ReportedModel
    budgets: Annotated[list[ReportedBudget], Field(max_length=3)]
    prompts: Annotated[list[Count], Field(max_length=2)]
    tokens: Count
    energy: Energy
    runs: Annotated[list[ReportedRun], Field(max_length=6)]
    left_out: Annotated[list[LeftOut], Field(max_length=12)]
    same_text: Annotated[list[SameText], Field(max_length=2)]

    @model_validator(mode="after")
    def _budgets_are_listed(self) -> MachineReport:
        names = [budget.name for budget in self.budgets]
        if len({*names}) < len(names) or not {run.budget for run in self.runs} | {
            left.budget for left in self.left_out
        } <= {*names}:
            raise ValueError("expected each budget once, and runs within these budgets")
        return self


def in_words(text: object) -> str | None:
    """A text of the system as `Words`: what they do not allow is left out. None for what is not a text, or empty."""
    if not isinstance(text, str):
        return None
    kept = re.sub(r"[^A-Za-z0-9 .,:()+_-]", "", text.replace("/", " ").replace("@", "at"))
    return " ".join(kept.split())[:LONGEST_WORDS].strip() or None


def in_name(text: object) -> str | None:
    """A text as `Name`: what that does not allow is left out."""
    if not isinstance(text, str):
        return None
    return re.sub(r"[^a-z0-9_.-]", "", text.lower()).lstrip("_.-")[:40] or None


def write_report(report: MachineReport, path: Path) -> None:
    """Raises OSError."""
    write_beside(path, (json.dumps(report.model_dump(), indent=1) + "\n").encode())


def read_report(path: Path) -> MachineReport:
    """Raises UsageError, which names the file, for what is not a report of this version, or is out of bounds."""
    if path.exists() and not path.is_file():  # a named pipe would wait for ever
        raise UsageError(f"{path.name!r} is not a file, expected a machine report.")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path.name!r} cannot be read ({error.strerror}).") from None
    if len(content) > MOST_FILE_BYTES:
        raise UsageError(f"{path.name!r} has more than {MOST_FILE_BYTES >> 10} KiB; a machine report is smaller.")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"{path.name!r} is not a machine report (expected what `mlxflash report` writes).")
    if (version := found.get("schema_version")) != SCHEMA_VERSION or type(version) is not int:
        raise UsageError(
            f"{path.name!r} has the schema version {version!r:.20}, expected {SCHEMA_VERSION}. Make the report again "
            "with this version of mlx_flash, or read it with the version that wrote it."
        )
    try:
        return MachineReport.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"][:6])
        raise UsageError(f"{path.name!r} is not a machine report: {where!r}: {first['msg'][:120]}.") from None
