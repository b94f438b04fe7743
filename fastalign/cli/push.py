"""`fastalign push`: send a written model to the Hugging Face hub; the one command that sends."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from fastalign.cli.settings import PushConfig
from fastalign.written_files import (
    ADAPTER_CONFIG,
    MANIFEST,
    changed_file,
    local_base,
    read_manifest,
)

# Errors of the hub's answers and of the connection; its HTTP library is one of several.
HUB_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def main(config: PushConfig) -> int:
    """Run `fastalign push`; return 0 when the files are on the hub, or are listed."""
    validate_repo_id(config.repo)
    folder = Path(config.folder).expanduser()
    sizes = files_to_send(folder)
    for name, size in sizes.items():
        print(f"{size:>14,}  {name}")
    where = config.repo if config.revision is None else f"{config.repo} (branch {config.revision})"
    print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, for {where}")
    for base in local_base(folder):
        print(f"the adapter names its base as {base}, a folder of this machine: others lack it")
    if config.dry_run:
        print("a dry run: nothing was sent")
        return 0
    print(f"sent: {send(config, folder, list(sizes))}")
    return 0


def files_to_send(folder: Path) -> dict[str, int]:
    """Return each file of a folder's manifest, and the manifest, with its size in bytes.

    Raises:
        ValueError: if the folder is not as a command of fastalign wrote it.
    """
    if not folder.is_dir():
        raise ValueError(f"folder: {folder} is no folder")
    found = read_manifest(folder)
    if found is None:
        below = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        advice = f"; send a folder in it ({', '.join(below)})" if below else ""
        raise ValueError(
            f"folder: {folder} is unfinished, or fastalign did not write it (no whole {MANIFEST})"
            f"{advice}"
        )
    entries = found[1]
    missing = [f"{name} is missing" for name in entries if not (folder / name).exists()]
    fault = next(iter(missing), None) or changed_file(folder, entries)
    if fault is not None:
        raise ValueError(f"folder: {folder} is not sent: {fault}")
    if not entries.keys() & {"config.json", ADAPTER_CONFIG}:
        raise ValueError(f"folder: {folder} holds no model")
    return {name: (folder / name).stat().st_size for name in (*entries, MANIFEST)}


def send(config: PushConfig, folder: Path, names: list[str]) -> str:
    """Commit the files to the repository, which is made first; return the commit's address.

    Raises:
        ValueError: if the repository is public and should be private.
        OSError: if the hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        if config.private and is_public(api, config.repo):
            raise ValueError(f"private: {config.repo} exists and is public; nothing was sent")
        api.create_repo(config.repo, private=config.private or None, exist_ok=True)
        if config.revision is not None:
            api.create_branch(config.repo, branch=config.revision, exist_ok=True)
        commit = api.create_commit(
            config.repo,
            [CommitOperationAdd(name, folder / name) for name in names],
            commit_message=f"Add the files of {folder.resolve().name}",
            revision=config.revision,
        )
    except HUB_ERROR as error:
        raise OSError(f"{api.endpoint}: {str(error) or type(error).__name__}") from error
    return str(commit.commit_url)


def is_public(api: HfApi, repo: str) -> bool:
    """Return whether a repository is on the hub, and everybody can read it."""
    try:
        return not api.model_info(repo).private
    except RepositoryNotFoundError:
        return False
