"""The hub itself: what is fetched from it and what is sent to it. Everything else here works on folders."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddnn.errors import HubError, first_line
from ddnn.network import DDNN


def fetch(
    name: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder called `name`, or one with these files of the repository called `name` (those that it has).

    A folder is preferred. Raises `HubError` if there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found: list[str] = []
    for file in files:
        try:
            found.append(hf_hub_download(str(name), file, revision=revision, token=token, cache_dir=cache_dir))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise _unreachable(name, error) from None
        except Exception as error:  # its errors, those of its HTTP client and of the file system
            raise _unreachable(name, error) from None
    if not found:
        raise HubError(f"the repository {name} of the Hugging Face hub holds no model: it has no {files[0]}")
    return Path(found[0]).parent


def _unreachable(name: str | Path, error: Exception) -> HubError:
    return HubError(
        f"{str(name)!r} is no folder here, and no model of that id can be had from the Hugging Face hub "
        f"({first_line(error)})"
    )


def push_to_hub(
    net: DDNN,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a DDNN",
    create_pr: bool | None = None,
    **save: Any,
) -> str:
    """`save_pretrained(net, ..., **save)`, sent to the repository `owner/name`; its address.

    The repository is made if it is not there, `private` or as the owner's account has it. Raises `HubError` where the
    hub refuses.
    """
    from ddnn.hub.folder import save_pretrained

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(net, folder, repo_id=repo_id, **save)
        return upload(
            folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message,
            create_pr=create_pr,
        )  # fmt: skip


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model",
    create_pr: bool | None = None,
) -> str:
    """Send the model in a folder to the repository `owner/name`, and nothing else that lies there; its address."""
    from huggingface_hub import HfApi

    folder = Path(folder)
    wanted = ["model.safetensors", "config.json", "README.md"]
    for file in wanted[:2]:
        if not (folder / file).is_file():
            raise HubError(f"{folder} holds no model to send: it has no {file}")
    try:
        api = HfApi(token=token)
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=wanted, revision=revision,
            commit_message=commit_message, create_pr=create_pr,
        )  # fmt: skip
    except Exception as error:  # its errors, those of its HTTP client and of the file system
        raise HubError(
            f"the Hugging Face hub did not take {folder} as {repo_id} ({first_line(error)}); an id is owner/name, and "
            "`hf auth login` says who you are"
        ) from None
    return str(made)
