"""What a running deployment leaves on disk so that others can find it and clean up after it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from deploy.access import Access
from deploy.processes import ProcessId

DEFAULT_FOLDER = Path.home() / ".cache" / "tandem"


@dataclass(frozen=True, slots=True)
class DeploymentState:
    """One deployment: its launcher, its mark, and where its Ray cluster is.

    `temp_dir` is None for a cluster that was there before; nothing of it is removed then.
    `operator_key` and `certificate` are files, not what is in them.
    """

    name: str
    mark: str
    launcher: ProcessId
    url: str
    ray_address: str | None
    temp_dir: str | None
    operator_key: str | None = None
    certificate: str | None = None

    @property
    def access(self) -> Access:
        return Access(self.url, self.operator_key, self.certificate)

    def write(self, folder: Path = DEFAULT_FOLDER) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = _path(self.name, folder)
        partial = path.with_suffix(f".{self.launcher.pid}")
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(path)

    @classmethod
    def read(cls, name: str, folder: Path = DEFAULT_FOLDER) -> Self | None:
        """Return what is on disk, None if nothing or nothing readable is."""
        try:
            document: dict[str, Any] = json.loads(_path(name, folder).read_text())
            return cls(**{**document, "launcher": ProcessId(**document["launcher"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def remove(self, folder: Path = DEFAULT_FOLDER) -> None:
        _path(self.name, folder).unlink(missing_ok=True)


def known_names(folder: Path = DEFAULT_FOLDER) -> list[str]:
    """Return the names of the deployments that have a state file."""
    return sorted(path.stem for path in folder.glob("*.json"))


def _path(name: str, folder: Path) -> Path:
    return folder / f"{name}.json"
