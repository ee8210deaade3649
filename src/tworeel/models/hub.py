"""Models by hub id: what is needed of them is downloaded once, then they are folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError

from tworeel.errors import UserError
from tworeel.models.family import ModelRequest
from tworeel.models.network_files import read_json
from tworeel.weights.tensor_files import SUFFIXES

Choose = Callable[[Sequence[str]], "Sequence[str] | None"]
"""All files of a repository -> those that are needed; None if it is of another family."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KEPT = (".safetensors", ".json", ".pth", ".model", ".jinja", "merges.txt")


def local_path(request: ModelRequest, choose: Choose) -> Path | None:
    """Return where the model is, after a download if it is given by its hub id; None if it is another's.

    Raises:
        UserError: it is neither there nor on the hub.
    """
    path = Path(request.path).expanduser()
    if path.exists():
        return path
    if is_hub_id(request.path) and not path.name.endswith((*SUFFIXES, ".json")):
        return fetch(request.path, choose)
    raise UserError(
        f"model.path = '{request.path}': no such file or folder, and not a hub id (organization/name)"
    )


def is_hub_id(text: str) -> bool:
    """Tell whether a text that is no existing path has the form `organization/name`."""
    return _HUB_ID.fullmatch(text) is not None


def fetch(repository: str, choose: Choose) -> Path | None:
    """Download what is needed of a repository and return its local folder; None if it is another family's.

    Without a connection a model that was downloaded before is used as it is.

    Raises:
        UserError: the id cannot be reached or its licence has not been accepted, or `choose` refuses it.
    """
    try:
        needed = choose(HfApi().list_repo_files(repository))
        return None if needed is None else Path(snapshot_download(repository, allow_patterns=list(needed)))
    except (HTTPError, OSError) as error:
        return _downloaded_before(repository, error)


def read_config(repository: str, name: str) -> dict[str, Any]:
    """Download and read one small file of a repository: before many gigabytes."""
    return read_json(Path(hf_hub_download(repository, name)))


def under(names: Iterable[str], folders: Iterable[str]) -> list[str]:
    """Return those files of some folders that models are made of."""
    starts = tuple(f"{folder}/" for folder in folders)
    return [name for name in names if name.startswith(starts) and name.endswith(_KEPT)]


def _downloaded_before(repository: str, error: Exception) -> Path:
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (HTTPError, OSError):
        raise UserError(f"model.path = '{repository}': {_reason(repository, error)}") from None


def _reason(repository: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"its authors ask for its licence to be accepted: do so on its page "
            f"(https://huggingface.co/{repository}), then set HF_TOKEN to a token of that account, "
            "or run `hf auth login`"
        )
    reason = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    return f"neither a file or folder nor a hub id within reach ({reason})"
