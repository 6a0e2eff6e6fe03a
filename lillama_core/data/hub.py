"""Rows of a dataset on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lillama_core.data.sources import HubDataset, Row
from lillama_core.errors import UserError, one_line
from lillama_core.system.seeds import derive_seed

# The Hub keeps a converted copy of datasets whose own loading script current libraries refuse to run.
_CONVERTED = "refs/convert/parquet"


def dataset_rows(dataset: HubDataset, seed: int | None) -> Iterator[Row]:
    """The rows of ``dataset`` as they are downloaded: shuffled by ``seed``, in order for None.

    Raises UserError in one line when the dataset cannot be had.
    """
    try:
        loaded = load(dataset.repo, dataset.config, dataset.split)
        if seed is not None:
            loaded = loaded.shuffle(seed=derive_seed(seed, "dataset") % 2**32)
        for number, row in enumerate(loaded, start=1):
            yield f"dataset {dataset.repo}, row {number}", row
    except UserError:
        raise
    except Exception as error:  # the library passes on errors of many others: network, formats, scripts
        raise UserError(f"dataset {_label(dataset)} cannot be loaded: {one_line(error)}{_advice()}") from error


def load(repo: str, config: str | None, split: str) -> Any:
    """The dataset as the library gives it, streamed where there is a connection."""
    import datasets

    settings: dict[str, Any] = {
        "split": split,
        # Offline only a copy prepared by an earlier download can serve, and such copies are not streamed.
        "streaming": not _offline(),
    }
    try:
        return datasets.load_dataset(repo, config, **settings)
    except RuntimeError as error:
        if "script" not in str(error).lower():
            raise
        return datasets.load_dataset(repo, config, revision=_CONVERTED, **settings)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _label(dataset: HubDataset) -> str:
    return ":".join(part for part in (dataset.repo, dataset.config, dataset.split) if part)


def _advice() -> str:
    remedy = "unset HF_HUB_OFFLINE" if _offline() else "check the name and the connection"
    return f" (no file of that name exists either; {remedy}, or name a local file)"
