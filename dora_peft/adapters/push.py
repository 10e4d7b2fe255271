"""An adapter's or an export's folder to the Hub, with its card, in one commit."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .formats.source import CONFIG as ADAPTER_CONFIG
from .formats.source import read_json
from .push_card import card_of, on_hub
from .push_files import CARD, Content, content_of, files_of

_BASE = "base_model_name_or_path"


class NotPushedError(OSError):
    """The Hub could not be reached, or did not take the files."""


@dataclass(frozen=True)
class Push:
    """What was uploaded, or would be.

    Attributes:
        repository, revision: Where to.
        files: The bytes of each file, by its name there.
        nbytes: Of all files.
        card: README.md.
        notes: What a reader should know, a sentence each.
        url: Of the commit, or of the pull request; None if nothing was uploaded.
    """

    repository: str
    revision: str
    files: dict[str, int]
    nbytes: int
    card: str
    notes: list[str]
    url: str | None = None


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    base: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> Push:
    """Upload an adapter's folder, or what `export` has written, with a card that says what it is.

    The folder stays as it is. In the repository, files of the same names and README.md are replaced, others stay.

    Args:
        folder: An adapter's, in any format that `convert` reads, or an export's.
        repository: "owner/name", or "name" for the user's own; made if there is none.
        base: The repository of the base model, for adapters whose config names a folder.
        private: Make the repository private.
        revision: A branch, which has to be there; "main" if None.
        message: Of the commit.
        create_pr: Open a pull request instead of writing to the branch.
        dry_run: Only say what would be uploaded, without asking the Hub for anything.

    Raises:
        UnreadableError: There is no such folder, it holds neither an adapter nor an export, or a link leads out of it.
        ValueError: `repository` or `base` is no repository's name.
        NotPushedError: No token, no network, or the Hub refused.
    """
    for name in (repository, *([] if base is None else [base])):
        _check_name(name)
    path = Path(folder)
    content = content_of(path)
    files, notes = files_of(path, deep=content.record is not None)
    configs = {name: _renamed(file, base) for name, file in files.items() if Path(name).name == ADAPTER_CONFIG}
    notes += [
        f"{name} names its base '{found}', which is no owner/name on the Hub: pass --base"
        for name, found in _folders(configs).items()
    ]

    def plan(where: str, url: str | None = None) -> Push:
        card = str(card_of(path, content, where, base))
        sizes = {
            name: len(configs[name][1]) if name in configs else file.stat().st_size for name, file in files.items()
        }
        sizes[CARD] = len(card.encode())
        return Push(where, revision or constants.DEFAULT_REVISION, sizes, sum(sizes.values()), card, notes, url)

    if dry_run:
        return plan(repository)
    plan(repository)
    api = _api()
    where, made = _repository(api, repository, private)
    ready = plan(where)
    added = {**files, **{name: text for name, (_, text) in configs.items()}, CARD: ready.card.encode()}
    operations = [CommitOperationAdd(name, one) for name, one in added.items()]
    try:
        commit = api.create_commit(
            where, operations, commit_message=message or _message(content), revision=revision, create_pr=create_pr
        )
    except Exception as error:
        left = f" The repository has been made and is empty: {constants.ENDPOINT}/{where}." if made else ""
        raise _refused(error, where, left) from error
    return plan(where, commit.pr_url or commit.commit_url)


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        revision = " The branch is named by --revision." if "@" in name else ""
        raise ValueError(f"'{name}' is no repository's name, owner/name or name: {error}{revision}") from error


def _renamed(file: Path, base: str | None) -> tuple[str, bytes]:
    """The base that an adapter's config names, and the config with `base` in its place."""
    text, found = file.read_bytes(), read_json(file) or {}
    if base is not None and found.get(_BASE) != base:
        text = (json.dumps({**found, _BASE: base}, indent=2) + "\n").encode()
    return base or str(found.get(_BASE) or ""), text


def _folders(configs: dict[str, tuple[str, bytes]]) -> dict[str, str]:
    return {name: named for name, (named, _) in configs.items() if named and on_hub(named) is None}


def _message(content: Content) -> str:
    if content.record is None:
        return "Upload a DoRA adapter"
    return f"Upload a DoRA adapter, exported as {content.record.route}"


def _api() -> HfApi:
    if constants.is_offline_mode():
        raise NotPushedError("HF_HUB_OFFLINE is set, so that the Hub is not asked for anything. Unset it to push.")
    token = get_token()
    if token is None:
        raise NotPushedError("There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    return HfApi(token=token)


def _repository(api: HfApi, name: str, private: bool) -> tuple[str, bool]:
    """The repository's full name, and whether it has been made now."""
    try:
        # None: the user's or the organisation's own choice
        return api.create_repo(name, private=private or None).repo_id, True
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise _refused(error, name) from error
    except Exception as error:
        raise _refused(error, name) from error
    try:
        where = api.create_repo(name, exist_ok=True).repo_id
        public = private and not api.model_info(where).private
    except Exception as error:
        raise _refused(error, name) from error
    if public:
        raise NotPushedError(
            f"'{where}' is there and public, and --private does not change that. Change it in its settings."
        )
    return where, False


def _refused(error: Exception, where: str, left: str = "") -> NotPushedError:
    """An error of the Hub's client, which has many kinds and long texts, in one line."""
    # an upload's error says what was uploaded, and its cause why it failed
    errors = [error, error.__cause__] if type(error) is RuntimeError and error.__cause__ is not None else [error]
    status = getattr(getattr(errors[-1], "response", None), "status_code", None)
    said = ", ".join(f"{type(one).__name__}: {' '.join(str(one).split())[:300].rstrip('.')}" for one in errors)
    mends = {
        401: "The token is not valid: log in again with `hf auth login`, or set HF_TOKEN.",
        403: f"The token may not write to '{where}'.",
        404: f"There is no such repository or branch of '{where}'.",
    }
    mend = "Is the Hub within reach?" if status is None else mends.get(int(status), "")
    return NotPushedError(f"Cannot push to '{where}' at {constants.ENDPOINT}: {said}. {mend}{left}".rstrip())
