"""A finished directory on the Hugging Face Hub: what can be told before the work, and the upload after it.

The token is the one that ``hf auth login`` or HF_TOKEN left; it is never written or shown, whatever a server says.
"""

from __future__ import annotations

from pathlib import Path

from lillama_core.errors import LillamaError, UserError, one_line


def check_push(repository: str) -> None:
    """Raise UserError unless a directory can be pushed to ``repository``, as far as can be told before there is one."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    option = f"--push {repository!r}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{option}: {one_line(error)}; a repository is OWNER/NAME, such as me/smaller") from None
    if constants.is_offline_mode():
        raise UserError(f"{option}: the Hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE; unset it")
    if get_token() is None:
        raise UserError(f"{option}: there is no token; run 'hf auth login', or set HF_TOKEN to one that may write")
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            reason = "the Hub does not know this token; run 'hf auth login' again, or set HF_TOKEN to another"
        else:
            reason = f"the Hub refuses: {_without_token(error)}"
        raise UserError(f"{option}: {reason}") from None
    # No network, in whatever words of whichever library.
    except Exception as error:
        raise UserError(f"{option}: {constants.ENDPOINT} cannot be reached ({_without_token(error)})") from None


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload all of ``folder`` to ``repository``, which is made if there is none, and return its address.

    Raises LillamaError that says how to do it later: the directory itself is complete.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    api = HfApi()
    try:
        # None: as the owner's settings have it.
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload a model made by lillama")
    except Exception as error:
        raise LillamaError(
            f"{str(folder)!r} is complete, but was not pushed to {repository!r}: {_without_token(error)};"
            f" 'hf upload {repository} {folder}' does it later"
        ) from None
    finally:
        if bars:
            enable_progress_bars()
    return str(made)


def _without_token(error: Exception) -> str:
    """What an error says, in one line; a server may have sent back what it was sent."""
    from huggingface_hub import get_token

    return one_line(str(error).replace(get_token() or "\0", "…") or error)
